"""The train step: one pure function of the state and a batch, jitted with shardings and donation."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from lmx.experiment import Experiment
from lmx.kernels.cross_entropy import LossSums
from lmx.models.model import aux_sum, cast_floats, stepped
from lmx.models.schedules import use_pipeline
from lmx.nn.module import Params
from lmx.objectives.objective import Batch
from lmx.sharding.rules import Sharding, use_sharding
from lmx.train.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]
Step = Any  # a jitted (state, batch) -> (state, metrics)
BATCH = ("act_batch", "act_length")


def gradients(experiment: Experiment, params: Params, batch: Batch, key: jax.Array | None) -> tuple[Params, LossSums]:
    """The gradient of the summed loss over all of the batch's targets, and the batch's sums.

    Microbatches are summed, and the step divides by the number of targets once, so that accumulation gives every
    target the same weight however they are spread.
    """
    train, spec = experiment.train, experiment.model.spec()

    def total(params: Params, micro: Batch, key: jax.Array | None) -> tuple[jax.Array, LossSums]:
        low = cast_floats(params, train.compute)
        with use_pipeline(experiment.pipeline):
            sums = experiment.objective.loss(spec, low, micro, key=key, remat=train.remat)
        return sums.total, sums

    grad = jax.grad(total, has_aux=True)
    if train.accumulate == 1:
        return cast(tuple[Params, LossSums], grad(params, batch, key))
    return cast(tuple[Params, LossSums], _accumulated(grad, params, batch, key, train.accumulate))


def _accumulated(grad: Any, params: Params, batch: Batch, key: jax.Array | None, count: int) -> Any:
    # Slice the batch with a stride, so that every device's rows are in every microbatch and nothing moves.
    micros = jax.tree.map(lambda a: a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1), batch)

    def body(carry: Any, scanned: Any) -> tuple[Any, None]:
        index, micro = scanned
        new = grad(params, micro, None if key is None else jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, carry, new), None

    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda a: a[0], micros), key)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, start, (jnp.arange(count), micros))[0]


def train_step(experiment: Experiment, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One optimizer step, skipped (and counted) where the gradient is not finite.

    Metrics, float32 scalars: loss (what is minimised), nll (nats a target), accuracy, grad_norm (before clipping),
    learning_rate, targets, skipped, skipped_in_a_row; of a mixture of experts also router_loss and dropped.
    """
    key = jax.random.fold_in(jax.random.key(experiment.train.seed), state.step)
    grads, sums = gradients(experiment, state.params, batch, key)
    weight = jnp.maximum(sums.weight, 1)
    norm = optax.global_norm(grads) / weight
    rate = experiment.schedule.at(state.step, experiment.train.steps)
    good = jnp.isfinite(norm)
    aux = jax.tree.map(lambda a: a / weight, sums.aux)
    new = _update(experiment, state, grads, _scale(experiment.optimizer.clip_norm, norm) / weight, rate, aux)
    kept = jax.tree.map(functools.partial(jnp.where, good), new, (state.params, state.optimizer, state.ema))
    row = jnp.where(good, 0, state.skipped_in_a_row + 1)
    params, optimizer, ema = kept
    state = TrainState(state.step + 1, params, optimizer, ema, state.skipped + jnp.where(good, 0, 1), row)
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
    return state, metrics | _told(aux)


def _told(aux: Params) -> Metrics:
    """Of a mixture of experts: the routers' losses, and the share of the choices that were dropped, a layer's mean. Of
    an objective that asks about pairs: the share of right answers."""
    if not aux:
        return {}
    pairs = aux.get("pairs")
    asked = {"pair_accuracy": pairs["correct"] / jnp.maximum(pairs["weight"], 1e-9)} if pairs else {}
    aux = {name: told for name, told in aux.items() if name != "pairs"}
    if not aux:
        return asked
    layers = aux_sum(jax.tree.map(jnp.ones_like, aux), "dropped")
    return asked | {"router_loss": aux_sum(aux, "loss"), "dropped": aux_sum(aux, "dropped") / jnp.maximum(layers, 1)}


def _scale(clip_norm: float, norm: jax.Array) -> jax.Array:
    """What clipping to a global norm multiplies the gradient by."""
    return jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12)) if clip_norm else jnp.float32(1)


def _update(
    experiment: Experiment, state: TrainState, grads: Params, scale: jax.Array, rate: jax.Array, aux: Params
) -> Any:
    """Parameters, optimizer state and average after a step along ``scale * grads``, if the gradient is good."""
    grads = jax.tree.map(lambda g: g * scale, grads)
    updates, optimizer = experiment.optimizer.build().update(grads, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    params = stepped(experiment.model.spec(), params, aux)
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
