"""Attention over a length that the mesh splits (``rules.act_length``), by the kind that the rules name.

- ``ring``: keys and values travel from shard to shard. Memory and traffic grow with the shard, not with the row; what
  a mask cannot reach is neither sent nor computed. For long rows.
- ``all_gather``: every shard fetches all keys and values at once. One exchange in place of many: for few shards, few
  key heads, or rows that are not that long.
- ``all_to_all`` (Jacobs et al. 2023, DeepSpeed Ulysses): shards of the length are exchanged for shards of the heads,
  and each device attends over whole rows. The least traffic; the heads must divide.

Under a causal mask the first two balance the work in the zig-zag order. Queries, keys and values are brought into it,
and results back, inside the kernel: then the rows' order everywhere else is that of one device, and with it
dropout, what an expert's capacity drops, and every loss.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmx.errors import UserError
from lmx.kernels.ring_attention import Axes, ring_attention
from lmx.kernels.scoring import Learned, Scoring, Where
from lmx.sharding.rules import SequenceAttention, Sharding, current, manual_axes, split_axes, ways

Attend = Callable[[jax.Array, jax.Array, jax.Array, Learned, Where], jax.Array]
"""Attention over whole rows: (query, key, value, learned, where) -> mixed."""


def across_shards(
    scoring: Scoring,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    learned: Learned,
    where: Where,
    *,
    itself: bool,
    whole: Attend,
) -> jax.Array:
    """Attention where ``act_length`` is split, in a region that is manual over every axis that splits its arguments.

    Over those of batch and heads too, because XLA gathers what its own axes split before a gather or an exchange along
    a manual one. Inside a region (a pipeline's, say) the arguments are local shards along its axes already.

    Args:
      scoring: what becomes of the scores.
      query: [batch, query_length, heads, head_dim], already scaled.
      key: [batch, kv_heads, head_dim, key_length].
      value: [batch, kv_heads, key_length, value_dim].
      learned: sinks and bias.
      where: positions and segments.
      itself: see :func:`lmx.kernels.attention.attention`.
      whole: the attention of one device, for rows that are whole.

    Raises:
      UserError: the mesh does not divide a length, or all_to_all the heads.
    """
    sharding, axes = current(), split_axes("act_length")
    assert sharding is not None
    body = functools.partial(BODIES[sharding.rules.sequence_attention], scoring, axes, itself, whole)
    same = split_axes("act_heads") == split_axes("act_kv_heads")
    heads, kv_heads = ("act_heads", "act_kv_heads") if same else (None, None)
    free = {a for name in ("act_batch", "act_length", heads) if name for a in split_axes(name)} - manual_axes()
    if not free:
        return body(query, key, value, learned, where)
    if not manual_axes() >= set(axes):
        for length in (query.shape[1], key.shape[-1]):
            sharding.check_length(length)
    spec = functools.partial(_spec, sharding, frozenset(free))
    queries, places = spec("act_batch", "act_length", heads), spec("act_batch", "act_length")
    keys, values = spec("act_batch", kv_heads, None, "act_length"), spec("act_batch", kv_heads, "act_length")
    parameters: Any = Learned(*cast(Any, (spec(heads), spec(None, heads))))
    region = jax.shard_map(
        body,
        mesh=_mesh(sharding),
        in_specs=(queries, keys, values, parameters, places),
        out_specs=queries,
        axis_names=free,
        check_vma=False,
    )
    # Outside of jit, JAX cannot run a region that leaves axes to the compiler.
    return jax.jit(region)(query, key, value, learned, where)


def _spec(sharding: Sharding, free: frozenset[str], *axes: str | None) -> PartitionSpec:
    return sharding.rules.spec(axes, set(sharding.mesh.axis_names) - free)


def _mesh(sharding: Sharding) -> Any:
    """The mesh to be manual on: inside another region, the one that the region knows."""
    return jax.sharding.get_abstract_mesh() if manual_axes() else sharding.mesh


@dataclass(frozen=True)
class LocalRows:
    """Which part of the queries' length is seen here: all, or in a region that is manual over ``axes`` a shard."""

    axes: Axes

    def of(self, draw: Callable[[tuple[int, ...]], jax.Array], shape: tuple[int, ...], axis: int) -> jax.Array:
        """This shard's part, of ``shape``, of what one device would draw for the whole length along ``axis``."""
        if not self.axes:
            return draw(shape)
        local = shape[axis]
        whole = draw((*shape[:axis], local * jax.lax.axis_size(self.axes), *shape[axis + 1 :]))
        return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(self.axes) * local, local, axis)


def whole_keys(key: jax.Array, value: jax.Array, where: Where) -> tuple[jax.Array, jax.Array, Where, LocalRows]:
    """All keys and values, where they stand, and which queries are here: for attention that needs whole rows of scores.

    Outside of regions that are manual over the length the compiler gathers them by itself.
    """
    axes = split_axes("act_length")
    if not axes or not manual_axes() >= set(axes):
        return key, value, where, LocalRows(())
    gather = lambda x, axis: jax.lax.all_gather(x, axes, axis=axis, tiled=True)  # noqa: E731
    where = where._replace(key_at=gather(where.key_at, 1), key_in=gather(where.key_in, 1))
    return gather(key, 3), gather(value, 2), where, LocalRows(axes)


def _keys_travel(gathered: bool, scoring: Scoring, axes: Axes, itself: bool, _: Attend, *arrays: Any) -> jax.Array:
    return ring_attention(scoring, *arrays, axes=axes, itself=itself, gathered=gathered)


def _heads_travel(
    scoring: Scoring,
    axes: Axes,
    itself: bool,
    whole: Attend,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    learned: Learned,
    where: Where,
) -> jax.Array:
    """The heads of each part of ``act_heads`` are dealt to the shards, so that no two devices along ``tensor`` mix."""
    parts, shards = ways("act_heads"), jax.lax.axis_size(axes)
    key, value = _repeated(key, query.shape[2], parts, shards), _repeated(value, query.shape[2], parts, shards)
    deal = lambda x, axis, length: _dealt(x, axis, length, parts, axes)  # noqa: E731
    gather = lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True)  # noqa: E731
    here = functools.partial(_own_heads, parts=parts, shards=shards, index=jax.lax.axis_index(axes))
    mixed = whole(
        deal(query, 2, 1), deal(key, 1, 3), deal(value, 1, 2), jax.tree.map(here, learned), Where(*map(gather, where))
    )
    split = mixed.reshape(*mixed.shape[:2], parts, 1, -1, mixed.shape[-1])
    back = jax.lax.all_to_all(split, axes, split_axis=1, concat_axis=3, tiled=True)
    return back.reshape(*back.shape[:2], -1, back.shape[-1])


def _repeated(x: jax.Array, heads: int, parts: int, shards: int) -> jax.Array:
    """Keys or values [batch, kv_heads, ...], each head as often as it takes to give one to every device.

    Raises:
      UserError: the query heads or the key heads do not divide.
    """
    need = parts * shards
    for name, count in (("query", heads), ("key", x.shape[1])):
        if count % need and (name == "query" or need % count):
            raise UserError(
                f"all_to_all splits heads over {need} devices ({shards} of the sequence, {parts} of the heads), which "
                f"does not divide the {count} {name} heads; choose a mesh that divides them, or set "
                "rules.sequence_attention to ring or all_gather"
            )
    return x if x.shape[1] % need == 0 else jnp.repeat(x, need // x.shape[1], axis=1)


def _dealt(x: jax.Array, heads: int, length: int, parts: int, axes: Axes) -> jax.Array:
    """Local length and all heads -> whole length and this shard's heads (of each part)."""
    split = x.reshape(*x.shape[:heads], parts, jax.lax.axis_size(axes), -1, *x.shape[heads + 1 :])
    length = length + 2 if length > heads else length
    dealt = jax.lax.all_to_all(split, axes, split_axis=heads + 1, concat_axis=length, tiled=True)
    return dealt.reshape(*dealt.shape[:heads], -1, *dealt.shape[heads + 3 :])


def _own_heads(x: jax.Array, parts: int, shards: int, index: jax.Array) -> jax.Array:
    """[..., heads] -> [..., this shard's heads], in the order of :func:`_dealt`."""
    split = x.reshape(*x.shape[:-1], parts, shards, -1)
    own = jax.lax.dynamic_index_in_dim(split, index, axis=split.ndim - 2, keepdims=False)
    return own.reshape(*x.shape[:-1], -1)


BODIES: dict[SequenceAttention, Callable[..., jax.Array]] = {
    "ring": functools.partial(_keys_travel, False),
    "all_gather": functools.partial(_keys_travel, True),
    "all_to_all": _heads_travel,
}
