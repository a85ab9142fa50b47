"""How well a decoder predicts documents when each token has a long context: windows that overlap."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lmx.data.config import DataConfig
from lmx.data.prepare import Prepared, prepare
from lmx.errors import UserError
from lmx.eval.asking import AskDecoder, reads_texts
from lmx.eval.likelihood import Read, Scores
from lmx.eval.metrics.measure import BOOTSTRAP, Measure, bootstrapped
from lmx.eval.run import Result
from lmx.eval.tasks.task import Examinee

LENGTH = 1024
"""Tokens in a window, where the model's context is longer and nothing else is asked for."""


def windows(tokens: Sequence[int] | np.ndarray, length: int, stride: int) -> list[Read]:
    """The rows in which each token but the first is predicted once: from all tokens before it, or from at least
    ``length - stride`` of them (and at most ``length``)."""
    total, reads, done = len(tokens) - 1, [], 0
    while done < total:
        end = min(done + (stride if done else length), total)
        start = max(0, end - length)
        at = tuple(range(done - start, end - start))
        reads.append(Read(_ints(tokens[start:end]), at, _ints(tokens[done + 1 : end + 1])))
        done = end
    return reads


def _ints(tokens: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens)


def sliding(examinee: Examinee, data: DataConfig, *, length: int = 0, stride: int = 0, documents: int = 0) -> Result:
    """Loss, perplexity and bits per byte of the held-out documents of ``data``, each by itself, in windows.

    Args:
      examinee: a decoder; with its own tokenizer in ``data``.
      data: the documents, prepared if need be.
      length: tokens in a window; 0 is the model's context, at most 1024.
      stride: how far windows advance; 0 is half the length. A token has at least ``length - stride`` before it, or all
        of its document's.
      documents: how many to read; 0 for all.

    Returns:
      ``loss`` (nats a token, the end of each document among them), ``perplexity``, ``bits_per_byte`` and ``accuracy``;
      their standard errors are by a bootstrap over the documents.

    Raises:
      UserError: a model that does not predict whole texts token by token, a length beyond its context, a stride that
        is not within the length, or no documents.
    """
    model = examinee.model
    way = reads_texts(examinee.asking, model.config.family)
    length = length or min(model.spec.context, LENGTH)
    stride = stride or max(1, length // 2)
    if not 0 < stride <= length <= model.spec.context:
        raise UserError(
            f"windows of {length} tokens with a stride of {stride} do not fit: expected 0 < stride <= length <= the "
            f"model's context of {model.spec.context}"
        )
    texts = list(_documents(prepare(data), way, documents))
    reads = [windows(tokens, length, stride) for tokens in texts]
    scores = iter(examinee.scorer.read([read for own in reads for read in own]))
    sizes = examinee.tokenizer.token_bytes()
    pairs = zip(reads, texts, strict=True)
    sums = np.array([_sums([next(scores) for _ in own], sizes[tokens[1:]]) for own, tokens in pairs])
    note = (
        f"windows of {length} tokens with a stride of {stride}: each token is predicted once, from at least "
        f"{length - stride} tokens before it or all of its document's"
    )
    settings = {"type": "sliding", "length": length, "stride": stride, "documents": documents}
    counts = {"documents": f"{len(texts):,}", "tokens": f"{int(sums[:, 1].sum()):,}", "context": note}
    return Result(len(texts), _measures(sums), settings, counts)


def _documents(prepared: Prepared, way: AskDecoder, most: int) -> Iterator[np.ndarray]:
    """The held-out documents: what opens a text, its tokens, and the end."""
    found = 0
    for source in prepared.sources:
        for document in source.chosen("held_out").tolist():
            if most and found == most:
                return
            found += 1
            stream = source.tokens.stream(document, 0, int(source.tokens.lengths[document]) + 2)
            stream[0] = way.opening
            yield stream


def _sums(scores: Sequence[Scores], sizes: np.ndarray) -> tuple[float, int, int, int]:
    """Of a document: nats, tokens, tokens that are the arg-max, bytes."""
    nats = -sum(float(own.logprobs.sum(dtype=np.float64)) for own in scores)
    return nats, sum(len(s.best) for s in scores), sum(int(s.best.sum()) for s in scores), int(sizes.sum())


def _measures(sums: np.ndarray) -> dict[str, Measure]:
    nats, tokens, right, size = sums.T
    n = len(sums)
    loss = lambda i: nats[i].sum() / tokens[i].sum()  # noqa: E731
    bits = lambda i: nats[i].sum() / math.log(2) / max(size[i].sum(), 1)  # noqa: E731
    found = {
        "loss": bootstrapped(loss, n, "loss", better=False),
        "perplexity": bootstrapped(lambda i: math.exp(min(loss(i), 700.0)), n, "perplexity", better=False),
        "bits_per_byte": bootstrapped(bits, n, "bits_per_byte", better=False),
        "accuracy": bootstrapped(lambda i: right[i].sum() / tokens[i].sum(), n, "accuracy"),
    }
    method = BOOTSTRAP.replace("examples", "documents")
    return {name: replace(measure, method=method) for name, measure in found.items()}
