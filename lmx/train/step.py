"""The train step: one pure function of the state and a batch, jitted with shardings and donation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmx.experiment import Experiment
from lmx.kernels.cross_entropy import LossSums
from lmx.models.model import cast_floats
from lmx.nn.module import Params
from lmx.objectives.objective import Batch
from lmx.sharding.rules import Sharding, use_sharding
from lmx.train.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
BATCH = ("act_batch", "act_length")


def gradients(experiment: Experiment, params: Params, batch: Batch, key: jax.Array | None) -> tuple[Params, LossSums]:
    """The gradient of the mean loss over all of the batch's targets, and the batch's sums.

    Microbatches are summed before dividing by the number of targets, so that accumulation gives every target the
    same weight however they are spread.
    """
    train, spec = experiment.train, experiment.model.spec()

    def total(params: Params, micro: Batch, key: jax.Array | None) -> tuple[jax.Array, LossSums]:
        low = cast_floats(params, train.compute)
        sums = experiment.objective.loss(spec, low, micro, key=key, remat=train.remat)
        return sums.total, sums

    grad = jax.grad(total, has_aux=True)
    if train.accumulate == 1:
        grads, sums = grad(params, batch, key)
    else:
        grads, sums = _accumulated(grad, params, batch, key, train.accumulate)
    return jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1), grads), sums


def _accumulated(grad: Any, params: Params, batch: Batch, key: jax.Array | None, count: int) -> Any:
    # Slice the batch with a stride, so that every device's rows are in every microbatch and nothing moves.
    micros = jax.tree.map(lambda a: a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1), batch)

    def body(carry: Any, scanned: Any) -> tuple[Any, None]:
        index, micro = scanned
        new = grad(params, micro, None if key is None else jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, carry, new), None

    zero = jnp.float32(0)
    start = (jax.tree.map(jnp.zeros_like, params), LossSums(zero, zero, zero, zero))
    return jax.lax.scan(body, start, (jnp.arange(count), micros))[0]


def train_step(experiment: Experiment, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One optimizer step, skipped (and counted) where the gradient is not finite.

    Metrics, float32 scalars: loss (what is minimised), nll (nats a target), accuracy, grad_norm (before clipping),
    learning_rate, targets, skipped, skipped_in_a_row.
    """
    key = jax.random.fold_in(jax.random.key(experiment.train.seed), state.step)
    grads, sums = gradients(experiment, state.params, batch, key)
    norm = optax.global_norm(grads)
    rate = experiment.schedule.at(state.step, experiment.train.steps)
    good = jnp.isfinite(norm)
    new = _update(experiment, state, grads, norm, rate)
    kept = jax.tree.map(functools.partial(jnp.where, good), new, (state.params, state.optimizer, state.ema))
    row = jnp.where(good, 0, state.skipped_in_a_row + 1)
    state = TrainState(state.step + 1, *kept, state.skipped + jnp.where(good, 0, 1), row)
    weight = jnp.maximum(sums.weight, 1)
    metrics = {
        "loss": sums.total / weight,
        "nll": sums.nll / weight,
        "accuracy": sums.correct / weight,
        "grad_norm": norm,
        "learning_rate": rate,
        "targets": sums.weight,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
    return state, metrics


def _update(experiment: Experiment, state: TrainState, grads: Params, norm: jax.Array, rate: jax.Array) -> Any:
    """Parameters, optimizer state and average after the step, if the gradient is good."""
    clip = experiment.optimizer.clip_norm
    if clip:
        scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
        grads = jax.tree.map(lambda g: g * scale, grads)
    updates, optimizer = experiment.optimizer.build().update(grads, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    decay = experiment.train.ema
    ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, params) if decay else state.ema
    return params, optimizer, ema


def jit_step(experiment: Experiment, sharding: Sharding) -> Step:
    """The compiled step: the state donated, everything laid out by the rules."""
    shardings = state_shardings(experiment, sharding)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with use_sharding(sharding):
            return train_step(experiment, state, batch)

    return jax.jit(
        step,
        in_shardings=(shardings, sharding.named(BATCH)),
        out_shardings=(shardings, sharding.replicated()),
        donate_argnums=0,
    )
