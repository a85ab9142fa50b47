"""The tokenizer of a run: opened from a file, or trained on the run's own training documents, once."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from lmx.data import cache, parts
from lmx.data.config import DataConfig, TokenizerFile, TrainedBpe
from lmx.data.documents import Documents
from lmx.data.records import open_records
from lmx.data.tokenizer import TextTokenizer, load_tokenizer, open_tokenizer, train_bpe
from lmx.errors import UserError

SAMPLE_BYTES = 10_000_000  # what a BPE is trained on: more text changes few merges


def prepare_tokenizer(
    config: DataConfig,
    documents: Sequence[Documents],
    held_out: Sequence[np.ndarray],
    root: Path,
    *,
    progress: bool = True,
) -> tuple[TextTokenizer, Path]:
    """The tokenizer and the directory that keeps it with the fingerprint it had when first used."""
    wanted = config.tokenizer
    if isinstance(wanted, TokenizerFile):
        given = open_tokenizer(wanted)
        more = [given for given in (wanted.pattern, wanted.special_tokens) if given]
        name = cache.key(str(Path(wanted.path).expanduser().absolute()), wanted.end_token, *more)
        directory = root / "tokenizers" / name
        _keep(directory, lambda: given)
        return _unchanged(given, directory, wanted.path), directory
    if isinstance(wanted, TrainedBpe):
        weights = [source.weight for source in config.sources]
        keys = [d.key for d in documents]
        reserved = dict.fromkeys((*wanted.special_tokens, *(t for s in config.sources for t in s.special_tokens)))
        wanted = replace(wanted, special_tokens=tuple(reserved))
        specials = [wanted.special_tokens] if wanted.special_tokens else []
        directory = root / "tokenizers" / cache.key(wanted.vocab_size, keys, weights, config.held_out, *specials)
        _keep(directory, lambda: _train(wanted, weights, documents, held_out, progress))
        return _unchanged(load_tokenizer(directory), directory, str(directory)), directory
    raise UserError(f"{type(wanted).__name__} is no tokenizer: use TrainedBpe or TokenizerFile")


def _keep(directory: Path, make: Callable[[], TextTokenizer]) -> None:
    if directory.exists():
        return
    with cache.locked(directory.parent):
        if not directory.exists():
            tokenizer = make()
            with cache.whole_dir(directory) as temporary:
                tokenizer.save(temporary)
                cache.write_json(temporary / "fingerprint.json", tokenizer.fingerprint)


def _unchanged(tokenizer: TextTokenizer, directory: Path, path: str) -> TextTokenizer:
    if tokenizer.fingerprint != cache.read_json(directory / "fingerprint.json"):
        tokens = directory.parent.parent / "tokens" / f"*-{directory.name}"
        raise UserError(
            f"the tokenizer {path} has changed since tokens were made with it: restore it, give the new one "
            f"another file name, or delete {directory} and {tokens} to make them again"
        )
    return tokenizer


def _train(
    wanted: TrainedBpe,
    weights: Sequence[float],
    documents: Sequence[Documents],
    held_out: Sequence[np.ndarray],
    progress: bool,
) -> TextTokenizer:
    shares = [SAMPLE_BYTES * weight / sum(weights) for weight in weights]
    chosen = zip(documents, held_out, shares, strict=True)
    both = [(x, m, s / (1 + bool(d.targets))) for d, m, s in chosen for x in (d, d.targets) if x]
    samples = (_sample(d, ~m & (np.asarray(d.sizes) > 0), share) for d, m, share in both)
    texts = (text for sample in samples for text in sample)
    open_records(documents[0].dataset)  # imports TFDS, which a progress bar in a thread does not bear
    size = min(SAMPLE_BYTES, sum(int(np.asarray(d.sizes).sum()) for d in documents))
    with _shown(texts, size, progress) as shown:
        return train_bpe(shown, wanted.vocab_size, wanted.special_tokens)


@contextmanager
def _shown(texts: Iterator[str], size: int, progress: bool) -> Iterator[Iterator[str]]:
    """The texts, of about ``size`` bytes, with a bar that stays while a tokenizer is made of them."""
    if not progress:
        yield texts
        return
    with parts.bytes_progress() as bar:
        task = bar.add_task("Reading for the tokenizer", total=size)

        def read() -> Iterator[str]:
            for text in texts:
                yield text
                bar.advance(task, len(text.encode()))
            bar.update(task, description="Training the tokenizer", completed=size)

        yield read()


def _sample(documents: Documents, mask: np.ndarray, limit: float) -> Iterator[str]:
    """Documents evenly from all over the source, up to about ``limit`` bytes."""
    chosen = np.flatnonzero(mask)
    total = int(np.asarray(documents.sizes)[chosen].sum())
    stride = max(1, math.ceil(total / limit))
    left = limit
    for text in documents.texts(chosen[::stride]):
        yield text[: int(left)]
        left -= len(text.encode())
        if left <= 0:
            return
