"""Pipeline parallelism: the mesh axis ``stage`` splits the layers, and microbatches go from stage to stage.

What is pipelined is the longest segment of a stack; other segments, embedding and head run on all stages, which share
their rows (``stage`` is the last axis of the rule ``act_batch``). Two ways lead through the layers:

- here, ``gpipe`` (Huang et al. 2019) and ``circular`` (interleaved: Narayanan et al. 2021, 2.2): a scan over ticks in
  which every stage works on one microbatch and hands it on; its transposition is the backward pass.
- in :mod:`lmx.models.lockstep`, ``1f1b`` (Narayanan et al. 2019), which needs the loss inside.

All of it is one region that is manual over ``stage``, over the axes of a split length, because a kernel's own region
nested in this one would gather what is stacked, and where it can be over axes of the batch: see :func:`rows_apart`.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lmx.errors import UserError
from lmx.models.block import RESIDUAL
from lmx.models.schedules import Plan, check_stack, outside_of_loss, plan_here, stages
from lmx.models.specs import Remat, Segment, StackSpec
from lmx.models.stack import is_unstacked, run_segment, run_stack
from lmx.nn.context import Context, Memory
from lmx.nn.module import Params
from lmx.nn.sublayer import Sublayer
from lmx.sharding.rules import Sharding, constrain, current, split_axes, use_sharding


def run_layers(
    spec: StackSpec, params: Params, x: jax.Array, context: Context, remat: Remat = "none"
) -> tuple[jax.Array, Params]:
    """:func:`lmx.models.stack.run_stack`, its longest segment through a pipeline where the mesh has stages."""
    if stages() == 1 or is_unstacked(params):
        return run_stack(spec, params, x, context, remat)
    plan = outside_of_loss(plan_here(x.shape[0]))
    check_stack(plan, spec)
    return run_stack(spec, params, x, context, remat, longest=functools.partial(_pipelined, plan))


ROWS = ["x", "positions", "segments", "types", "prefix", "memory", "batch"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=ROWS, meta_fields=[])
@dataclass(frozen=True)
class Rows:
    """What is cut into microbatches: hidden states, what of their context has rows, and a loss's batch."""

    x: jax.Array
    positions: jax.Array
    segments: jax.Array
    types: jax.Array | None
    prefix: jax.Array | None
    memory: Memory | None
    batch: dict[str, jax.Array] = field(default_factory=dict)

    @classmethod
    def of(cls, x: jax.Array, context: Context, batch: dict[str, jax.Array] | None = None) -> "Rows":
        """The rows of a stack's input."""
        here = context
        return cls(x, here.positions, here.segments, here.types, here.prefix, here.memory, batch or {})

    def context(self, shared: Params, key: jax.Array | None) -> Context:
        """The context of one microbatch's layers."""
        context = Context(self.positions, self.segments, key, memory=self.memory, shared=shared)
        return replace(context, types=self.types, prefix=self.prefix)


@dataclass(frozen=True)
class Work:
    """What a stage does to a microbatch: run a part of a segment."""

    plan: Plan
    segment: Segment
    remat: Remat
    first_layer: int
    rows: tuple[str, ...] = ()
    """The mesh axes of the batch along which it is manual."""

    @property
    def along(self) -> tuple[str, ...]:
        """The mesh axes that cut what a stage sees of a microbatch."""
        return (*split_axes("act_length"), *self.rows)

    @property
    def parts(self) -> list[Sublayer]:
        """The sublayers of the segment's pattern."""
        return [part for block in self.segment.pattern for part in block.parts]

    @property
    def part(self) -> Segment:
        """The layers of one chunk of one stage."""
        return replace(self.segment, repeats=self.segment.repeats // (self.plan.stages * self.plan.chunks))

    def __call__(
        self, params: Params, shared: Params, rows: Rows, key: jax.Array | None, micro: Any, chunk: Any
    ) -> tuple[jax.Array, Params]:
        """Hidden states after this stage's chunk number ``chunk``, and what the sublayers tell."""
        position = chunk * self.plan.stages + jax.lax.axis_index("stage")
        first = self.first_layer + position * self.part.repeats * len(self.part.pattern)
        return run_segment(self.part, params, rows.x, rows.context(shared, self._key(key, micro)), self.remat, first)

    def _key(self, key: jax.Array | None, micro: Any) -> jax.Array | None:
        """The random key of a microbatch: one alone draws what the whole batch would."""
        axes = split_axes("act_length")
        if key is not None and axes:
            key = jax.random.fold_in(key, jax.lax.axis_index(axes))
        return key if key is None or self.plan.microbatches == 1 else jax.random.fold_in(key, micro)

    def check(self, context: Context) -> None:
        """Raises UserError for sublayers that must see whole rows, where the mesh splits the length."""
        axes = split_axes("act_length")
        whole = [what for part in self.parts if (what := part.by_rows(context.key is not None))]
        if axes and whole:
            raise UserError(
                f"{whole[0]} goes by whole rows, but a pipeline over a mesh that splits the length (mesh axes "
                f"{', '.join(axes)}) sees parts of them; set mesh.stage or mesh.{axes[0]} to 1"
            )


def chunked(plan: Plan, tree: Any) -> Any:
    """Stacked layers [layers, ...] -> [stages, chunks, layers of a chunk, ...].

    Layers lie in their order everywhere else, as checkpoints have them: with several chunks this is an exchange of
    parameters between the stages, once a batch.
    """
    sizes = (plan.chunks, plan.stages, -1)
    return jax.tree.map(lambda a: a.reshape(*sizes, *a.shape[1:]).swapaxes(0, 1), tree)


def unchunked(tree: Any) -> Any:
    """The inverse of :func:`chunked`."""
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[3:]), tree)


def cut(plan: Plan, tree: Any) -> Any:
    """[batch, ...] -> [microbatches, rows, ...], with a stride, so that every device's rows are in every microbatch."""
    count = plan.microbatches
    return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1), tree)


def laid(tree: Any) -> Any:
    """What is cut, each device with its own rows of every microbatch: XLA might gather them all."""
    sharding = cast(Sharding, current())
    rows = sharding.rules.spec(("act_batch",), {"stage"})[0]

    def one(a: jax.Array) -> jax.Array:
        parts = PartitionSpec(None, rows, *[PartitionSpec.UNCONSTRAINED] * (a.ndim - 2))
        return jax.lax.with_sharding_constraint(a, NamedSharding(sharding.mesh, parts))

    return jax.tree.map(one, tree)


def uncut(tree: Any) -> Any:
    """The inverse of :func:`cut`."""
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), tree)


def pick(tree: Any, index: Any) -> Any:
    """One of the first axis."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), tree)


def rows_apart(work: Work, told: Params, params: Any, key: jax.Array | None) -> tuple[str, ...]:
    """The mesh axes of the batch along which a pipeline's region can be manual.

    Then the gradients of its parameters are summed over them once, where XLA would do so in every tick. That takes
    axes that cut no parameter, and layers for which the other rows of a microbatch do not matter: that tell no
    statistics of them, and draw nothing at random, which is drawn for a whole microbatch at once.
    """
    sharding = cast(Sharding, current())
    noise = [part.draws for part in work.parts] + [block.depth is not None for block in work.segment.pattern]
    noise += [jnp.issubdtype(a.dtype, jax.dtypes.prng_key) for a in jax.tree.leaves(params)]  # an adapter's dropout
    if jax.tree.leaves(told) or (key is not None and any(noise)):
        return ()
    return tuple(a for a in sharding.axes("act_batch") if a != "stage" and a not in sharding.rules.parameter_axes)


def place(work: Work, tree: Any) -> Any:
    """How microbatches enter a region: the same on every stage, split where it is manual over lengths and rows."""
    parts = (None, work.rows or None, split_axes("act_length") or None)
    return jax.tree.map(lambda a: PartitionSpec(*parts[: a.ndim]), tree)


def by_stage(tree: Any) -> Any:
    """How what is chunked enters a region, and leaves it."""
    return jax.tree.map(lambda a: PartitionSpec("stage"), tree)


def everywhere(tree: Any) -> Any:
    """How what is the same everywhere enters a region, and leaves it."""
    return jax.tree.map(lambda a: PartitionSpec(), tree)


def summable(a: jax.Array) -> jax.Array:
    """The same, to be summed over a manual axis: as float32 on CPU, where XLA's compiler aborts on bfloat16."""
    on_cpu = cast(Sharding, current()).on_cpu
    return a.astype(jnp.float32) if on_cpu and jnp.issubdtype(a.dtype, jnp.floating) else a


def region(work: Work, body: Any, in_specs: Any, out_specs: Any) -> Any:
    """``body`` in a region that is manual over the stages, and what cuts a microbatch there.

    The gradient of what is the same along one of those axes is a sum over it: see :func:`summable`.
    """
    axes = {"stage", *work.along}
    mesh = cast(Sharding, current()).mesh

    def wide(a: jax.Array, spec: PartitionSpec) -> jax.Array:
        named = {n for part in spec for n in (part if isinstance(part, tuple) else (part,))}
        return a if named >= axes else summable(a)

    def run(*args: Any) -> Any:
        def narrow(*given: Any) -> Any:
            return body(*jax.tree.map(lambda a, like: a.astype(like) if a.dtype != like else a, given, dtypes))

        dtypes = jax.tree.map(lambda a: a.dtype, args)
        inner = jax.shard_map(
            narrow, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
        )
        return inner(*jax.tree.map(wide, args, in_specs))

    return run


def real(work: Work, segments: jax.Array) -> jax.Array:
    """Float32 [microbatches]: each one's share of the tokens that are not padding, of those that are here."""
    counts = (segments > 0).sum(tuple(range(1, segments.ndim)), dtype=jnp.float32)
    return counts / jnp.maximum(across(work, counts.sum()), 1)


def across(work: Work, tree: Any) -> Any:
    """Sums over the shards of a microbatch."""
    return jax.tree.map(lambda a: jax.lax.psum(a, work.along), tree) if work.along else tree


def shift(tree: Any, plan: Plan, by: int) -> Any:
    """Hands something to the next stage (``by`` 1) or the one before (-1), in a ring."""
    to = [(i, (i + by) % plan.stages) for i in range(plan.stages)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, "stage", to), tree)


def _pipelined(
    plan: Plan, segment: Segment, params: Params, x: jax.Array, context: Context, remat: Remat, first_layer: int
) -> tuple[jax.Array, Params]:
    """``run_segment`` through the stages.

    What the sublayers tell is the mean over the microbatches, by their tokens that are not padding.
    """
    work = Work(plan, segment, remat, first_layer)
    work.check(context)
    parts, rows = chunked(plan, params), laid(cut(plan, Rows.of(x, context)))
    alike = (dict(context.shared), context.key)
    told = told_by(work, parts, alike, rows)
    work = replace(work, rows=rows_apart(work, told, (parts, alike[0]), context.key))
    run = region(
        work,
        functools.partial(_ticks, work, told),
        (by_stage(parts), everywhere(alike), place(work, rows)),
        (_scattered(work), by_stage(told)),
    )
    hidden, told = run(parts, alike, rows)
    return constrain(uncut(hidden.astype(x.dtype)), RESIDUAL), unchunked(told)


def _scattered(work: Work) -> PartitionSpec:
    """How results leave the region: each stage with its part of the microbatches, if it divides them."""
    stage = None if work.plan.microbatches % work.plan.stages else "stage"
    return PartitionSpec(stage, work.rows or None, split_axes("act_length") or None)


def told_by(work: Work, parts: Params, alike: Any, rows: Rows) -> Params:
    """The shapes of what one chunk's sublayers tell of a microbatch, from what is chunked and cut."""

    def alone(parts: Params, alike: Any, rows: Rows) -> Params:
        params, here = jax.tree.map(lambda a: a[0, 0], parts), jax.tree.map(lambda a: a[0], rows)
        return run_segment(work.part, params, here.x, here.context(*alike), work.remat, work.first_layer)[1]

    with use_sharding(None):  # which a microbatch, outside of the region, may not divide
        return cast(Params, jax.eval_shape(alone, parts, alike, rows))


def _ticks(work: Work, told: Params, parts: Params, alike: Any, rows: Rows) -> tuple[jax.Array, Params]:
    """What every stage does.

    The first stage keeps a queue of what goes in: the microbatches, then what comes back from the last stage, to go
    around again with the next chunk; in the end it holds the results.
    """
    plan, (shared, key) = work.plan, alike
    stage, share = jax.lax.axis_index("stage"), real(work, rows.segments)
    own, count = jax.tree.map(lambda a: a[0], parts), plan.microbatches

    def tick(carry: Any, now: jax.Array) -> Any:
        queue, received, sums = carry
        job = jnp.clip(now - stage, 0, plan.chunks * count - 1)
        chunk, micro, works = job // count, job % count, job == now - stage
        here = pick(replace(rows, x=queue), micro)
        here = replace(here, x=jnp.where(stage == 0, here.x, received))
        x, new = work(pick(own, chunk), shared, here, key, micro, chunk)
        weight = jnp.where(works, share[micro], 0)
        sums = jax.tree.map(lambda s, a: s.at[chunk].add(weight * a), sums, new)
        received = shift(x, plan, 1)
        back = now - (plan.stages - 1)
        kept = jnp.where(back >= 0, received, pick(queue, back % count))
        return (jax.lax.dynamic_update_index_in_dim(queue, kept, back % count, 0), received, sums), None

    zeros = jax.tree.map(lambda s: jnp.zeros((plan.chunks, *s.shape), s.dtype), told)
    queue = constrain(rows.x, (None, *RESIDUAL))
    (queue, _, sums), _ = jax.lax.scan(tick, (queue, queue[0], zeros), jnp.arange(plan.ticks))
    results = summable(jnp.where(stage == 0, queue, 0))
    if _scattered(work)[0]:
        results = jax.lax.psum_scatter(results, "stage", scatter_dimension=0, tiled=True)
    else:
        results = jax.lax.psum(results, "stage")
    return results, jax.tree.map(lambda s: s[None], across(work, sums))
