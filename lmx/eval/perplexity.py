"""Loss, perplexity and bits per byte over packed held-out rows."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lmx.data.config import DataConfig
from lmx.data.loader import Loader
from lmx.data.prepare import prepare
from lmx.data.rows import held_out_rows
from lmx.decode.forward import is_encoder
from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.experiment import Compute, Experiment, TrainConfig
from lmx.models.model import cast_floats
from lmx.nn.module import Params
from lmx.objectives.objective import Batch
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Sharding, use_sharding

Sums = dict[str, jax.Array]
Totals = dict[str, Any]
LENGTH = 1024
"""Tokens in a row for a model of no run, where its context is longer."""


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
      baseline_accuracy: share of targets that are the commonest of them: what guessing one token reaches.
      pair_accuracy: of an objective that asks about pairs of sentences, the share of right answers.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    targets: int
    bytes: int
    baseline_accuracy: float = math.nan
    pair_accuracy: float | None = None


def jit_sums(experiment: Experiment, sharding: Sharding) -> Callable[[Params, Batch, jax.Array], Sums]:
    """The compiled sums of one batch: (params, batch, int32 bytes of each token [tokens]) -> float32 scalars, and
    ``counts`` [tokens], how often each token is a target."""

    def sums(params: Params, batch: Batch, token_bytes: jax.Array) -> Sums:
        with use_sharding(sharding):
            low = cast_floats(params, experiment.train.compute)
            loss = experiment.objective.loss(experiment.model.spec(), low, batch, remat="full")
            targets, weights = experiment.objective.scored(batch)
            counted = jnp.where(weights > 0, token_bytes[targets], 0)
        counts = jnp.zeros(token_bytes.shape, jnp.float32).at[targets].add(weights)
        pairs = loss.aux.get("pairs", {})
        sums = {"nll": loss.nll, "weight": loss.weight, "correct": loss.correct, "bytes": counted.sum()}
        return sums | {"counts": counts} | {f"pair_{name}": value for name, value in pairs.items()}

    return jax.jit(sums, out_shardings=sharding.replicated())


def score(compiled: Callable[..., Sums], params: Params, batches: Iterable[Batch], token_bytes: jax.Array) -> Score:
    """The score of a model over batches, summed in float64 on the host.

    Raises:
      UserError: the batches hold no targets.
    """
    totals: Totals = {}
    pending: Sums | None = None
    for batch in batches:
        sums = compiled(params, batch, token_bytes)
        totals = _added(totals, pending)  # one batch late, so that the device never waits for the host
        pending = sums
    totals = _added(totals, pending)
    if not totals.get("weight"):
        raise UserError("the held-out rows hold nothing to predict; raise data.held_out or give more text")
    loss = totals["nll"] / totals["weight"]
    size, asked = totals["bytes"], totals.get("pair_weight")
    return Score(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=totals["nll"] / math.log(2) / size if size else math.nan,
        accuracy=totals["correct"] / totals["weight"],
        targets=int(totals["weight"]),
        bytes=int(size),
        baseline_accuracy=float(np.max(totals["counts"])) / totals["weight"],
        pair_accuracy=totals["pair_correct"] / asked if asked else None,
    )


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
        than it has, or nothing to score.
    """
    if model.experiment is None:
        _check_predicts(model)
    experiment = model.experiment or _unrun(model)
    length = length or experiment.train.length
    if length > model.spec.context:
        raise UserError(f"--length {length} is longer than the model's context of {model.spec.context}")
    prepared = prepare(data)
    if prepared.tokenizer.vocab_size > model.spec.vocab:
        raise UserError(
            f"the tokenizer has {prepared.tokenizer.vocab_size} tokens, more than the model's {model.spec.vocab}; it "
            "belongs to another model"
        )
    sized = replace(experiment, train=replace(experiment.train, length=length))
    held_out: Any = held_out_rows(prepared, length=sized.layout(prepared.tokenizer))
    held_out = held_out[:rows] if 0 < rows < len(held_out) else held_out
    token_bytes = jnp.asarray(prepared.tokenizer.token_bytes())
    sharding = model.sharding or Sharding(build_mesh(MeshConfig(data=1), jax.devices()[:1]), experiment.rules)
    with Loader(held_out, batch=batch) as batches:
        started = (_started(b, prepared.tokenizer.end_id, _start(model)) for b in batches)
        return score(jit_sums(experiment, sharding), model.params, started, token_bytes)


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
