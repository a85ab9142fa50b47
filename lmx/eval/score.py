"""How well a model predicts: sums over batches, on the device, and the score that they make on the host."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.errors import UserError
from lmx.eval.labelled import telling
from lmx.experiment import Experiment
from lmx.models.model import cast_floats
from lmx.nn.module import Params
from lmx.objectives.objective import Batch, Frozen, Objective
from lmx.sharding.apart import over_rows, rows_apart
from lmx.sharding.rules import Sharding, use_sharding

Sums = dict[str, Any]
"""By name, float32 arrays of the device, or float64 ones of the host."""
Summing = Callable[..., Sums]
"""(params, batch, int32 bytes of each token [tokens], the frozen models that the objective reads) -> sums."""


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


def jit_sums(experiment: Experiment, sharding: Sharding) -> Summing:
    """The compiled sums of one batch: scalars, of classes also [classes], and except of pairs ``counts`` [tokens], how
    often each is a target."""
    objective = experiment.objective.evaluated
    return _jitted(functools.partial(_sums, objective, objective.measured, experiment), sharding)


def jit_row_sums(experiment: Experiment, sharding: Sharding) -> Summing:
    """The same sums for each group of rows (see :func:`lmx.sharding.apart.over_rows`), [groups, ...]; ``counts`` stay
    [tokens]. Of :data:`lmx.eval.labelled.KINDS` also ``examples``."""
    objective = experiment.objective.evaluated

    def apart(*arguments: Any) -> Sums:
        with rows_apart():
            return _sums(objective, telling(objective).measured, experiment, *arguments)

    return _jitted(apart, sharding)


def _jitted(sums: Summing, sharding: Sharding) -> Summing:
    def placed(*arguments: Any) -> Sums:
        with use_sharding(sharding):
            return sums(*arguments)

    return jax.jit(placed, out_shardings=sharding.replicated())


def _sums(
    objective: Objective,
    measured: Callable[..., Any],
    experiment: Experiment,
    params: Params,
    batch: Batch,
    token_bytes: jax.Array,
    frozen: Mapping[str, Frozen],
) -> Sums:
    low = cast_floats(params, experiment.train.compute)
    loss, measures = measured(frozen, experiment.model.spec(), low, batch)
    targets, weights = objective.scored(batch)
    counted = jnp.where(weights > 0, token_bytes[targets], 0)
    counts = jnp.zeros(token_bytes.shape, jnp.float32).at[targets].add(weights)
    sums = {"nll": loss.nll, "weight": loss.weight, **measures}
    sums |= {} if objective.targets == "numbers" else {"correct": loss.correct}
    sums |= {"bytes": over_rows(jnp.sum, counted)} if objective.targets == "tokens" else {}
    sums |= {} if objective.targets == "pairs" else {"counts": counts}
    return sums | {f"pair_{name}": value for name, value in loss.aux.get("pairs", {}).items()}


def on_host(
    compiled: Summing,
    params: Params,
    batches: Iterable[Batch],
    token_bytes: jax.Array,
    frozen: Mapping[str, Frozen] | None = None,
) -> Iterator[Sums]:
    """The sums of each batch, one batch late, so that the device never waits for the host; ``frozen`` is for objectives
    that need it."""
    pending: Sums | None = None
    for batch in batches:
        sums = compiled(params, batch, token_bytes, frozen or {})
        if pending is not None:
            yield _float64(pending)
        pending = sums
    if pending is not None:
        yield _float64(pending)


def _float64(sums: Sums) -> Sums:
    return jax.tree.map(lambda a: np.asarray(a, np.float64), sums)


def score(sums: Iterable[Sums]) -> Score:
    """The score that the sums of all batches make together.

    Raises:
      UserError: there are no targets.
    """
    totals: Sums = {}
    for own in sums:
        totals = {name: totals.get(name, 0.0) + value for name, value in own.items()}
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


def _baseline(totals: Sums) -> float:
    """The share of the commonest target; of pairs, one half."""
    return float(np.max(totals["counts"])) / totals["weight"] if "counts" in totals else 0.5


def _f1(totals: Sums) -> float | None:
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
