"""Loss, perplexity and bits per byte over packed held-out rows."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmx.errors import UserError
from lmx.experiment import Experiment
from lmx.models.model import cast_floats
from lmx.nn.module import Params
from lmx.objectives.objective import Batch
from lmx.sharding.rules import Sharding, use_sharding

Sums = dict[str, jax.Array]


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
      loss: nats a target.
      perplexity: e to the loss.
      bits_per_byte: all the targets' bits, over the bytes of text that they stand for; comparable between tokenizers.
      accuracy: share of targets that are the arg-max.
      targets: how many there were.
      bytes: of text.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    targets: int
    bytes: int


def jit_sums(experiment: Experiment, sharding: Sharding) -> Callable[[Params, Batch, jax.Array], Sums]:
    """The compiled sums of one batch: (params, batch, int32 bytes of each token [tokens]) -> float32 scalars."""

    def sums(params: Params, batch: Batch, token_bytes: jax.Array) -> Sums:
        with use_sharding(sharding):
            low = cast_floats(params, experiment.train.compute)
            loss = experiment.objective.loss(experiment.model.spec(), low, batch, remat="full")
            counted = jnp.where(batch["segment_ids"] > 0, token_bytes[batch["targets"]], 0)
        return {"nll": loss.nll, "weight": loss.weight, "correct": loss.correct, "bytes": counted.sum()}

    return jax.jit(sums, out_shardings=sharding.replicated())


def score(compiled: Callable[..., Sums], params: Params, batches: Iterable[Batch], token_bytes: jax.Array) -> Score:
    """The score of a model over batches, summed in float64 on the host.

    Raises:
      UserError: the batches hold no targets.
    """
    totals = dict.fromkeys(("nll", "weight", "correct", "bytes"), 0.0)
    pending: Sums | None = None
    for batch in batches:
        sums = compiled(params, batch, token_bytes)
        totals = _added(totals, pending)  # one batch late, so that the device never waits for the host
        pending = sums
    totals = _added(totals, pending)
    if not totals["weight"]:
        raise UserError("the held-out rows hold nothing to predict; raise data.held_out or give more text")
    loss = totals["nll"] / totals["weight"]
    size = totals["bytes"]
    return Score(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=totals["nll"] / math.log(2) / size if size else math.nan,
        accuracy=totals["correct"] / totals["weight"],
        targets=int(totals["weight"]),
        bytes=int(size),
    )


def _added(totals: dict[str, float], sums: Any) -> dict[str, float]:
    return totals if sums is None else {k: v + float(sums[k]) for k, v in totals.items()}

