"""Loss, perplexity and bits per byte over packed held-out rows."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lmx.data.config import DataConfig
from lmx.data.loader import Loader
from lmx.data.prepare import prepare
from lmx.data.rows import held_out_rows, spread
from lmx.data.tokenizer import TextTokenizer
from lmx.decode.forward import is_encoder
from lmx.decode.frozen import load_frozen
from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.experiment import Compute, Experiment, TrainConfig
from lmx.models.model import cast_floats
from lmx.models.schedules import PipelineConfig, check_pipeline
from lmx.models.specs import ModelSpec
from lmx.nn.module import Params
from lmx.objectives.objective import Batch, Frozen
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.processes import agreed, is_first
from lmx.sharding.rules import Sharding, use_sharding

Sums = dict[str, jax.Array]
Totals = dict[str, Any]
BATCH = ("act_batch", "act_length")
LENGTH = 1024
"""Tokens in a row for a model of no run, where its context is longer."""


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
      loss: nats a target; of numbers, their squared error.
      perplexity: e to the loss; where targets are no tokens of text, None, as the bits per byte.
      bits_per_byte: all the targets' bits, over the bytes of text that they stand for; comparable between tokenizers.
      accuracy: share of targets that are the arg-max; None of numbers.
      targets: how many there were.
      bytes: of text.
      baseline_accuracy: what guessing reaches: the share of targets that are the commonest of them; of pairs, one half.
      pair_accuracy: of an objective that asks about pairs of sentences, the share of right answers.
      f1: of classes, the mean over those that there are; of answers, the mean over examples of their tokens'.
    """

    loss: float
    perplexity: float | None
    bits_per_byte: float | None
    accuracy: float | None
    targets: int
    bytes: int
    baseline_accuracy: float | None = math.nan
    pair_accuracy: float | None = None
    f1: float | None = None


def jit_sums(experiment: Experiment, sharding: Sharding) -> Callable[..., Sums]:
    """The compiled sums of one batch: (params, batch, int32 bytes of each token [tokens], the frozen models that the
    objective reads) -> float32 scalars, and except of pairs ``counts`` [tokens], how often each is a target."""
    objective = experiment.objective.evaluated

    def sums(params: Params, batch: Batch, token_bytes: jax.Array, frozen: Mapping[str, Frozen]) -> Sums:
        with use_sharding(sharding):
            low = cast_floats(params, experiment.train.compute)
            loss, measures = objective.measured(frozen, experiment.model.spec(), low, batch)
            targets, weights = objective.scored(batch)
            counted = jnp.where(weights > 0, token_bytes[targets], 0)
        counts = jnp.zeros(token_bytes.shape, jnp.float32).at[targets].add(weights)
        pairs = loss.aux.get("pairs", {})
        sums = {"nll": loss.nll, "weight": loss.weight, **measures}
        sums |= {} if objective.targets == "numbers" else {"correct": loss.correct}
        sums |= {"bytes": counted.sum()} if objective.targets == "tokens" else {}
        sums |= {} if objective.targets == "pairs" else {"counts": counts}
        return sums | {f"pair_{name}": value for name, value in pairs.items()}

    return jax.jit(sums, out_shardings=sharding.replicated())


def score(
    compiled: Callable[..., Sums],
    params: Params,
    batches: Iterable[Batch],
    token_bytes: jax.Array,
    frozen: Mapping[str, Frozen] | None = None,
) -> Score:
    """The score of a model over batches, summed in float64 on the host; ``frozen`` is for objectives that need it.

    Raises:
      UserError: the batches hold no targets.
    """
    totals: Totals = {}
    pending: Sums | None = None
    for batch in batches:
        sums = compiled(params, batch, token_bytes, frozen or {})
        totals = _added(totals, pending)  # one batch late, so that the device never waits for the host
        pending = sums
    totals = _added(totals, pending)
    if not totals.get("weight"):
        raise UserError("the held-out rows hold nothing to predict; raise data.held_out or give more text")
    loss = totals["nll"] / totals["weight"]
    size, asked = totals.get("bytes"), totals.get("pair_weight")
    chosen, is_text = "correct" in totals, size is not None
    return Score(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)) if is_text else None,
        bits_per_byte=(totals["nll"] / math.log(2) / size if size else math.nan) if is_text else None,
        accuracy=totals["correct"] / totals["weight"] if chosen else None,
        targets=round(float(totals["weight"])),
        bytes=int(size or 0),
        baseline_accuracy=_baseline(totals) if chosen else None,
        pair_accuracy=totals["pair_correct"] / asked if asked else None,
        f1=_f1(totals),
    )


def _baseline(totals: Totals) -> float:
    """The share of the commonest target; of pairs, one half."""
    return float(np.max(totals["counts"])) / totals["weight"] if "counts" in totals else 0.5


def _f1(totals: Totals) -> float | None:
    """The targets' mean F1, or the mean over the classes that there are (macro F1)."""
    if "f1" in totals:
        return float(totals["f1"] / totals["weight"])
    if "cases" not in totals:
        return None
    there = totals["cases"] > 0
    both = totals["guesses"] + totals["cases"]
    return float((2 * totals["hits"][there] / both[there]).mean())


def in_words(score: Mapping[str, Any], prefix: str = "") -> str:
    """The values of a score (by the names of :class:`Score`, after ``prefix``) as a part of a sentence."""
    found = {name: score.get(prefix + name) for name in ("perplexity", "bits_per_byte", "accuracy", "f1")}
    told = [f"loss {score[prefix + 'loss']:.4f}"]
    if prefix + "bleu" in score:
        told.append(f"BLEU {score[prefix + 'bleu']:.2f} (copying the source: {score[prefix + 'copy_bleu']:.2f})")
    if found["bits_per_byte"] is not None:
        told += [f"perplexity {found['perplexity']:.2f}", f"{found['bits_per_byte']:.4f} bits per byte"]
    if found["accuracy"] is not None:
        baseline = score[prefix + "baseline_accuracy"]
        told.append(f"accuracy {found['accuracy']:.1%} (guessing: {baseline:.1%})")
    if (pairs := score.get(prefix + "pair_accuracy")) is not None:
        told.append(f"pairs {pairs:.1%}")
    return ", ".join(told + ([f"F1 {found['f1']:.4f}"] if found["f1"] is not None else []))


def evaluate(model: Model, data: DataConfig, *, length: int = 0, batch: int = 8, rows: int = 0) -> Score:
    """The score of a model on the held-out documents of ``data``, prepared if need be.

    Args:
      model: a loaded one: of a run, it is scored on what its objective predicts, else on next tokens.
      data: the documents; its tokenizer must be the model's.
      length: tokens in a row; 0 is the run's training length, or 1024 (at most the context) of a model of no run.
      batch: rows at once.
      rows: how many rows to score; 0 for all.

    Raises:
      UserError: a model that does not predict the next token, rows longer than its context, a tokenizer of more tokens
        than it has, or nothing to score; a mesh that does not divide the batch or the rows.
    """
    if model.experiment is None:
        _check_predicts(model)
    experiment = model.experiment or _unrun(model)
    length = length or experiment.train.length
    if length > model.spec.context:
        raise UserError(f"--length {length} is longer than the model's context of {model.spec.context}")
    sharding = model.sharding or Sharding(build_mesh(MeshConfig(data=1), jax.local_devices()[:1]), experiment.rules)
    _check_mesh(experiment, sharding, batch, length)
    with agreed():
        prepared = prepare(data, progress=is_first())
    require_tokens_fit(prepared.tokenizer, model.spec)
    sized = replace(experiment, train=replace(experiment.train, length=length))
    held_out: Any = spread(held_out_rows(prepared, length=sized.layout(prepared.tokenizer)), rows)
    token_bytes = jnp.asarray(prepared.tokenizer.token_bytes())
    with Loader(held_out, batch=batch, sharding=sharding.named(BATCH)) as batches:
        started = (_started(b, prepared.tokenizer.end_id, _start(model)) for b in batches)
        frozen = load_frozen(replace(experiment, objective=experiment.objective.evaluated), sharding, prepared)
        return score(jit_sums(experiment, sharding), model.params, started, token_bytes, frozen)


def require_tokens_fit(tokenizer: TextTokenizer, spec: ModelSpec) -> None:
    """Raises UserError for a tokenizer with more tokens than the model has."""
    if tokenizer.vocab_size > spec.vocab:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's {spec.vocab}; it belongs to "
            "another model"
        )


def _check_mesh(experiment: Experiment, sharding: Sharding, batch: int, length: int) -> None:
    """Raises UserError, with the nearest that fits, for rows that the mesh does not divide."""
    check_pipeline(PipelineConfig(), sharding, experiment.model.spec(), batch)
    sharding.check_length(length)
    ways = sharding.ways(BATCH[0])
    if batch % ways:
        near = max(ways, round(batch / ways) * ways)
        raise UserError(
            f"the mesh splits the batch into {ways} (mesh axes {', '.join(sharding.axes(BATCH[0]))}), which does not "
            f"divide --batch {batch}; the nearest that it divides is {near}"
        )


def _check_predicts(model: Model) -> None:
    name = model.config.family
    if is_encoder(model.spec):
        raise UserError(f"this {name} is an encoder, which has no perplexity; use its embed, scores or logits")
    if model.spec.encoder is not None or model.spec.head is None:
        raise UserError(f"this {name} ({model.config.task}) does not predict the next token of a text")


def _unrun(model: Model) -> Experiment:
    """The settings for a model of no run: it computes in the dtype of its parameters."""
    compute = cast(Compute, np.dtype(model.compute or model.params["embedding"]["table"].dtype).name)
    return Experiment(model=model.config, train=TrainConfig(compute=compute, length=min(LENGTH, model.spec.context)))


def _start(model: Model) -> int | None:
    """The token that the model expects where a document begins, if it is not the end of another."""
    return None if model.tokenizer is None else model.tokenizer.start_id


def _started(batch: Batch, end: int, start: int | None) -> Batch:
    """The batch with ``start`` in place of the end of text where documents begin."""
    if start is None:
        return batch
    begins = (batch["positions"] == 0) & (batch["tokens"] == end) & (batch["segment_ids"] > 0)
    return {**batch, "tokens": jnp.where(begins, start, batch["tokens"])}


def _added(totals: Totals, sums: Any) -> Totals:
    if sums is None:
        return totals
    return {name: totals.get(name, 0.0) + np.asarray(value, np.float64) for name, value in sums.items()}
