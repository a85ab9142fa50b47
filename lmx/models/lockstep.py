"""The schedule 1F1B (Narayanan et al. 2019, PipeDream-Flush) in lock-step: each tick of every stage is a forward of one
microbatch and the backward of an older one.

The loss is formed in the last stage's tick, where a microbatch turns around, and gradients come out of the forward pass
as they do in :mod:`lmx.kernels.cross_entropy`; the backward pass only scales them. A stage keeps the inputs of at most
``2 * stages - 1`` microbatches, however many there are, and computes a layer's inside again when its gradient is due.
All stages compute the loss of what they have, and only the last one's counts: in lock-step they would wait for it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmx.errors import UserError
from lmx.kernels.cross_entropy import LossSums
from lmx.models.block import RESIDUAL
from lmx.models.model import Inputs, apply, aux_sum, embedded, normed
from lmx.models.pipeline import (
    Rows,
    Work,
    across,
    by_stage,
    chunked,
    cut,
    everywhere,
    laid,
    pick,
    place,
    region,
    rows_apart,
    shift,
    summable,
    told_by,
    unchunked,
)
from lmx.models.schedules import check_stack, plan_here, schedule, stages
from lmx.models.specs import ModelSpec, Remat, StackSpec
from lmx.models.stack import run_stack
from lmx.nn.context import Memory
from lmx.nn.module import Params
from lmx.sharding.apart import over_rows
from lmx.sharding.rules import constrain, split_axes

Score = Callable[[Params, jax.Array, dict[str, jax.Array]], LossSums]
"""(parameters, hidden states [rows, length, embed], batch of the same rows) -> sums over their targets."""


def lockstep_loss(
    spec: ModelSpec,
    params: Params,
    inputs: Inputs,
    batch: dict[str, jax.Array],
    score: Score,
    *,
    memory: Memory | None = None,
    key: jax.Array | None = None,
    remat: Remat = "none",
) -> LossSums:
    """What ``score`` gives after all layers, with the sublayers' own losses.

    Those losses, and what the sublayers tell, are weighted microbatch by microbatch by the targets in it.

    Raises:
      UserError: the mesh or the pipeline's numbers do not fit the model or the batch.
    """
    plan = plan_here(inputs.tokens.shape[0])
    check_stack(plan, spec.stack)
    x, context = embedded(spec, params, None, spec.width, inputs, key)
    context = replace(context, memory=memory, shared=params["stack"].get("shared", {}))
    *first, last = spec.stack.segments
    name = f"segment_{len(first)}"
    told: Params = {}
    if first:
        x, told = run_stack(StackSpec(tuple(first)), params["stack"], x, context, remat)
    work = Work(plan, last, remat, sum(s.repeats * len(s.pattern) for s in first))
    work.check(context)
    outside = {k: v for k, v in params.items() if k not in ("stack", "encoder")}
    step = Step(work, name, lambda weights, x, micro: score(weights, normed(spec, weights, spec.width, x), micro))
    weights = Weights(chunked(plan, params["stack"][name]), dict(context.shared), outside)
    sums = _differentiable(step)(weights, laid(cut(plan, Rows.of(x, context, batch))), context.key)
    return with_told(sums, {"stack": told} if told else {})


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "shared", "outside"], meta_fields=[])
@dataclass(frozen=True)
class Weights:
    """Parameters: of the layers [stages, chunks, layers, ...], of the whole stack, and outside of it."""

    layers: Params
    shared: Params
    outside: Params


@dataclass(frozen=True)
class Step:
    """What a tick does: a stage's work, and the score ``(outside, hidden, batch) -> LossSums`` at its end."""

    work: Work
    segment: str
    score: Callable[..., LossSums]

    def scored(self, outside: Params, x: jax.Array, batch: Any) -> tuple[jax.Array, LossSums]:
        """The loss of a microbatch, and its sums."""
        sums = self.score(outside, x, batch)
        return sums.total, sums

    def forward(self, layers: Params, shared: Params, x: Any, memory: Any, rows: Rows, key: Any, micro: Any) -> Any:
        """``((hidden, routers' losses), told)`` of this stage's layers."""
        if rows.memory is not None:
            rows = replace(rows, memory=replace(rows.memory, hidden=memory))
        x, told = self.work(layers, shared, replace(rows, x=x), key, micro, 0)
        return (x, aux_sum(told, "loss")), told


def _differentiable(step: Step) -> Any:
    """``(weights, rows, key) -> LossSums``, whose gradient for weights, hidden states and memory is formed at once."""

    @jax.custom_vjp
    def loss(weights: Weights, rows: Rows, key: jax.Array | None) -> LossSums:
        return forward(weights, rows, key)[0]

    def forward(weights: Weights, rows: Rows, key: jax.Array | None) -> Any:
        sums, gradients = _run(step, weights, rows, key)
        return sums, gradients

    def backward(gradients: Any, cotangents: LossSums) -> Any:
        d_weights, d_x, d_memory = jax.tree.map(lambda d: (d * cotangents.total).astype(d.dtype), gradients)
        memory = None if d_memory is None else Memory(d_memory, None, None)  # type: ignore[arg-type]
        none = Rows(None, None, None, None, None, None, None)  # type: ignore[arg-type]
        return d_weights, replace(none, x=d_x, memory=memory), None

    loss.defvjp(forward, backward)
    return loss


def _run(step: Step, weights: Weights, rows: Rows, key: jax.Array | None) -> Any:
    """The sums, and the gradients of weights, hidden states and memory, in the weights' layout."""
    alike = (weights.shared, weights.outside, key)
    memory = None if rows.memory is None else rows.memory.hidden
    told = told_by(step.work, weights.layers, (weights.shared, key), rows)
    work = replace(step.work, rows=rows_apart(step.work, told, weights, key))
    gradients = (by_stage(weights.layers), everywhere(alike[:2]), place(work, rows.x), place(work, memory))
    run = region(
        work,
        functools.partial(_ticks, replace(step, work=work), told),
        (by_stage(weights.layers), everywhere(alike), place(work, rows)),
        (PartitionSpec(), by_stage(told), gradients),
    )
    sums, told, (layers, (shared, outside), d_x, d_memory) = run(weights.layers, alike, rows)
    if told:
        sums = replace(sums, aux={**sums.aux, "stack": {step.segment: unchunked(told)}})
    return sums, (Weights(layers, shared, outside), d_x, d_memory)


def _ticks(step: Step, told: Params, layers: Params, alike: Any, rows: Rows) -> Any:
    """What every stage does; gradients are summed in float32."""
    plan, (shared, outside, key) = step.work.plan, alike
    stage, count, depth = jax.lax.axis_index("stage"), plan.microbatches, 2 * plan.stages - 1
    own = jax.tree.map(lambda a: a[0, 0], layers)

    def at(micro: Any) -> tuple[Rows, Any]:
        here = pick(rows, micro)
        return here, None if here.memory is None else here.memory.hidden

    def turn(now: Any, received: jax.Array) -> Any:
        """A forward: its input and output; and the loss there, with its gradients, for the last stage."""
        job = now - stage
        micro = jnp.clip(job, 0, count - 1)
        here, memory = at(micro)
        x = jnp.where(stage == 0, here.x, received)
        y = step.forward(own, shared, x, memory, here, key, micro)[0][0]
        _, back, sums = jax.vjp(lambda p, y: step.scored(p, y, here.batch), outside, y, has_aux=True)
        counts = jnp.where((stage == plan.stages - 1) & (job == micro), 1.0, 0.0)
        return x, y, jax.tree.map(lambda a: a * counts, sums), back(counts.astype(sums.total.dtype))

    def unwind(now: Any, saved: jax.Array, d_y: jax.Array, weight: jax.Array) -> Any:
        """The backward of an older microbatch: its number, what its sublayers told by weight, and the gradients."""
        job = now - 2 * (plan.stages - 1) + stage
        micro = jnp.clip(job, 0, count - 1)
        here, memory = at(micro)
        forward = functools.partial(step.forward, rows=here, key=key, micro=micro)
        (_, extra), back, told = jax.vjp(forward, own, shared, pick(saved, job % depth), memory, has_aux=True)
        works = (job == micro).astype(jnp.float32)
        told = jax.tree.map(lambda a: a * weight * works, told)
        return micro, extra * weight * works, told, back(((d_y * works).astype(d_y.dtype), weight * works))

    def tick(carry: Any, now: jax.Array) -> Any:
        down, up, saved, total = carry
        x, y, sums, (d_outside, d_y) = turn(now, down)
        saved = jax.lax.dynamic_update_index_in_dim(saved, x, (now - stage) % depth, 0)
        d_y, weight = jax.tree.map(functools.partial(jnp.where, stage == plan.stages - 1), (d_y, sums.weight), up)
        micro, extra, told, (d_own, d_shared, d_x, d_memory) = unwind(now, saved, d_y, weight)
        new = replace(sums, total=sums.total + extra), told, d_own, d_shared, d_outside
        first = jnp.where(stage == 0, d_x, 0)
        total = _added(total, new, (first, d_memory), micro)
        return (shift(y, plan, 1), shift((d_x, weight), plan, -1), saved, total), None

    start = _start(step, told, own, shared, outside, rows)
    x = constrain(rows.x, (None, *RESIDUAL))
    saved = jnp.broadcast_to(x[:1], (depth, *x.shape[1:]))
    up = (jnp.zeros_like(x[0]), jnp.float32(0))
    *_, (sums, each) = jax.lax.scan(tick, (x[0], up, saved, start), jnp.arange(plan.ticks))[0]
    return _gathered(step.work, sums, each, (own, shared, outside))


def _start(step: Step, told: Params, own: Params, shared: Params, outside: Params, rows: Rows) -> Any:
    """Sums of nothing yet: over the microbatches, and of each of them."""
    memory = None if rows.memory is None else rows.memory.hidden
    first = pick(rows, 0)
    sums = jax.eval_shape(step.scored, outside, first.x, first.batch)[1]
    sizes = (sums, told, own, shared, outside)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), sizes), jax.tree.map(
        jnp.zeros_like, (rows.x, memory)
    )


def _added(total: Any, new: Any, of_micro: Any, micro: Any) -> Any:
    sums, each = total
    sums = jax.tree.map(lambda s, a: s + a, sums, new)
    return sums, jax.tree.map(lambda s, a: s.at[micro].add(a), each, of_micro)


def _gathered(work: Work, sums: Any, each: Any, like: Any) -> Any:
    """The sums over all stages and shards of a microbatch, in the layout and dtypes that the region gives back."""
    sums, told, own, shared, outside = across(work, sums)
    wide = jax.tree.map(summable, each)
    sums, shared, outside, wide = jax.lax.psum((sums, shared, outside, wide), "stage")
    each = jax.tree.map(lambda a, like: a.astype(like.dtype), wide, each)
    own, shared, outside = jax.tree.map(lambda d, a: d.astype(a.dtype), (own, shared, outside), like)
    told, own = jax.tree.map(lambda a: a[None, None], (told, own))
    return sums, told, (own, (shared, outside), *each)


def score_layers(
    spec: ModelSpec,
    params: Params,
    inputs: Inputs,
    batch: dict[str, jax.Array],
    score: Score,
    *,
    memory: Memory | None = None,
    key: jax.Array | None = None,
    remat: Remat = "none",
    whole_rows: bool = False,
) -> LossSums:
    """``score(params, hidden, batch)`` of :func:`lmx.models.model.apply`'s hidden states, with the sublayers' losses.

    How an objective takes its loss, so that every schedule of a pipeline can: a score is a sum over rows, and under
    1f1b it is asked for some of them at a time, with all parameters but the stacks'. Where the mesh splits the length
    it is then asked for each part of a row alone, unless it needs ``whole_rows``. Within
    :func:`lmx.sharding.apart.rows_apart` (where evaluation wants standard errors) the sums are those of each group of
    rows, [groups].

    Raises:
      UserError: under 1f1b, on a mesh that splits the length, a score that needs whole rows.
    """
    if schedule() == "1f1b" and stages() > 1:
        if whole_rows and split_axes("act_length"):
            raise UserError(
                "this objective looks at whole rows, which pipeline.schedule 1f1b does not have where the sequence is "
                "split: use gpipe or circular, or a mesh with sequence 1"
            )
        return lockstep_loss(spec, params, inputs, batch, score, memory=memory, key=key, remat=remat)
    out = apply(spec, params, inputs, memory=memory, key=key, remat=remat)
    return with_told(over_rows(functools.partial(score, params), out.hidden, batch), out.aux)


def with_told(sums: LossSums, aux: Params) -> LossSums:
    """The sums with the sublayers' own losses (routers') in what is minimised, each target carrying them once, beside
    what they hold of other sublayers already."""
    if not aux:
        return sums
    told = jax.tree.map(lambda a: jnp.multiply.outer(jax.lax.stop_gradient(a), sums.weight), aux)
    return replace(sums, total=sums.total + aux_sum(aux, "loss") * sums.weight, aux=_merged(sums.aux, told))


def _merged(a: Params, b: Params) -> Params:
    """Both trees in one; they share no leaf."""
    return {**a, **{name: _merged(a[name], tree) if name in a else tree for name, tree in b.items()}}
