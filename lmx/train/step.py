"""The train step: one pure function of the state and a batch, jitted with shardings and donation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from lmx.adapters.kernels import with_dropout
from lmx.experiment import Experiment
from lmx.kernels.cross_entropy import LossSums
from lmx.models.model import aux_sum, cast_floats, stepped
from lmx.models.schedules import use_pipeline
from lmx.nn.module import Params
from lmx.objectives.objective import Batch, Frozen
from lmx.optim.factors import rate_factors
from lmx.optim.names import put
from lmx.sharding.rules import Sharding, use_sharding
from lmx.train.state import TrainState, axes_of, state_shardings, trained, transformation

Metrics = dict[str, jax.Array]
Step = Any  # a jitted (state, batch) -> (state, metrics)
BATCH = ("act_batch", "act_length")


def gradients(
    experiment: Experiment,
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    frozen: Mapping[str, Frozen] | None = None,
) -> tuple[Params, LossSums]:
    """The gradient of the summed loss over all of the batch's targets, of the parameters that are trained, and the
    batch's sums.

    Microbatches are summed, and the step divides by the number of targets once, so that accumulation gives every
    target the same weight however they are spread. What an objective asks beside them has weights of the whole batch.
    """
    batch = experiment.objective.weighed(batch)
    grad = jax.grad(_total(experiment, params, frozen), has_aux=True)
    own, count = trained(experiment, params), experiment.train.accumulate
    if count == 1:
        return cast(tuple[Params, LossSums], grad(own, batch, key))
    return cast(tuple[Params, LossSums], _accumulated(grad, own, batch, key, count))


def _total(experiment: Experiment, params: Params, frozen: Mapping[str, Frozen] | None) -> Any:
    """(what is trained, batch, key) -> the summed loss and the batch's sums; the rest of the parameters is fixed."""
    train, spec = experiment.train, experiment.spec()
    loss = experiment.objective.loss_with(frozen or {})

    def total(own: Params, micro: Batch, key: jax.Array | None) -> tuple[jax.Array, LossSums]:
        low = with_dropout(cast_floats(put(params, own), train.compute), key)
        with use_pipeline(experiment.pipeline):
            sums = loss(spec, low, micro, key=key, remat=train.remat)
        return sums.total, sums

    return total


def _micro(batch: Batch, count: int) -> Batch:
    """[batch, ...] -> [count, batch / count, ...], with a stride, so that every device's rows are in every microbatch
    and nothing moves."""
    return jax.tree.map(lambda a: a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1), batch)


def _accumulated(grad: Any, params: Params, batch: Batch, key: jax.Array | None, count: int) -> Any:
    micros = _micro(batch, count)

    def body(carry: Any, scanned: Any) -> tuple[Any, None]:
        index, micro = scanned
        new = grad(params, micro, None if key is None else jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, carry, new), None

    grad = jax.jit(grad)  # traced once, for its shapes and in the loop
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda a: a[0], micros), key)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, start, (jnp.arange(count), micros))[0]


def train_step(experiment: Experiment, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One optimizer step, skipped (and counted) where the gradient is not finite.

    Metrics, float32 scalars: loss (what is minimised), nll (nats a target), grad_norm (before clipping), learning_rate,
    targets, skipped, skipped_in_a_row; accuracy, unless numbers are learned; of a mixture of experts also router_loss
    and dropped.
    """
    key = step_key(experiment, state)
    return advance(experiment, state, batch, *gradients(experiment, state.params, batch, key, state.frozen))


def step_key(experiment: Experiment, state: TrainState) -> jax.Array:
    """The random key of the step that the state is before."""
    return jax.random.fold_in(jax.random.key(experiment.train.seed), state.step)


def advance(
    experiment: Experiment, state: TrainState, batch: Batch, grads: Params, sums: LossSums
) -> tuple[TrainState, Metrics]:
    """The state after a step along what :func:`gradients` found for a batch, and :func:`train_step`'s metrics."""
    weight = jnp.maximum(sums.weight, 1)
    norm = optax.global_norm(grads) / weight
    rate = experiment.schedule.at(state.step, experiment.train.steps)
    good = jnp.isfinite(norm)
    aux = jax.tree.map(lambda a: a / weight, sums.aux)
    mean = functools.partial(_mean, experiment, state, batch, step_key(experiment, state))
    grads = jax.tree.map(lambda g: g * (_scale(experiment.optimizer.clip_norm, norm) / weight), grads)
    new = _update(experiment, state, grads, rate, aux, mean)
    old = trained(experiment, state.params), state.optimizer, state.ema
    own, optimizer, ema = jax.tree.map(functools.partial(jnp.where, good), new, old)
    row = jnp.where(good, 0, state.skipped_in_a_row + 1)
    skipped, params = state.skipped + jnp.where(good, 0, 1), put(state.params, own)
    state = TrainState(state.step + 1, params, optimizer, ema, skipped, row, state.frozen)
    metrics = {
        "loss": sums.total / weight,
        "nll": sums.nll / weight,
        "grad_norm": norm,
        "learning_rate": rate,
        "targets": sums.weight,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
    chosen = {} if experiment.objective.targets == "numbers" else {"accuracy": sums.correct / weight}
    return state, metrics | chosen | _told(aux)


def _told(aux: Params) -> Metrics:
    """What sums tell beside the loss, a target's mean: an objective's own ``metrics``; of pairs that it asks about, the
    share of right answers; of a mixture of experts the routers' losses, and the share of dropped choices by layer."""
    aux = dict(aux)
    told, pairs = dict(aux.pop("metrics", {})), aux.pop("pairs", None)
    if pairs:
        told["pair_accuracy"] = pairs["correct"] / jnp.maximum(pairs["weight"], 1e-9)
    if aux:
        layers = aux_sum(jax.tree.map(jnp.ones_like, aux), "dropped")
        told["router_loss"] = aux_sum(aux, "loss")
        told["dropped"] = aux_sum(aux, "dropped") / jnp.maximum(layers, 1)
    return told


def _scale(clip_norm: float, norm: jax.Array) -> jax.Array:
    """What clipping to a global norm multiplies the gradient by."""
    return jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12)) if clip_norm else jnp.float32(1)


def _mean(experiment: Experiment, state: TrainState, batch: Batch, key: jax.Array, own: Params) -> jax.Array:
    """The mean loss of the first microbatch as a function of what is trained, for optimizers that ask for more than its
    gradient."""
    first = jax.tree.map(lambda a: a[0], _micro(batch, experiment.train.accumulate))
    total, sums = _total(experiment, state.params, state.frozen)(own, first, key)
    return total / jnp.maximum(sums.weight, 1)


def _update(
    experiment: Experiment, state: TrainState, grads: Params, rate: jax.Array, aux: Params, mean: Callable[..., Any]
) -> Any:
    """What is trained, optimizer state and average after a step along ``grads``, if they are good."""
    spec, own, axes = experiment.model.spec(), trained(experiment, state.params), axes_of(experiment)
    updates, optimizer = transformation(experiment).update(grads, state.optimizer, own, obj_fn=mean)
    factors = rate_factors(experiment.optimizer, spec, trained(experiment, axes))
    own = jax.tree.map(lambda p, u, factor: p - rate * factor * u, own, updates, factors)
    own = trained(experiment, stepped(spec, put(state.params, own), aux))
    decay = experiment.train.ema
    ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, own) if decay else state.ema
    return own, optimizer, ema


def jit_step(experiment: Experiment, sharding: Sharding, frozen: Mapping[str, Frozen] | None = None) -> Step:
    """The compiled step: the state donated, everything laid out by the rules; ``frozen`` are the state's."""
    shardings = state_shardings(experiment, sharding, frozen)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with use_sharding(sharding):
            return train_step(experiment, state, batch)

    return jax.jit(
        step,
        in_shardings=(shardings, sharding.named(BATCH)),
        out_shardings=(shardings, sharding.replicated()),
        donate_argnums=0,
    )
