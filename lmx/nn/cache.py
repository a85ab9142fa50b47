"""The caches that attention writes while decoding: named streams, so that attention needs no branch on their kind."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from lmx.sharding.rules import LogicalAxes, constrain, current

Streams = dict[str, dict[str, jax.Array]]
"""What one block caches: by sublayer, its streams by name."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["streams", "view"], meta_fields=[])
@dataclass(frozen=True)
class LayerCache:
    """One layer's cache: ``streams`` maps a name ("key", "value") to its array; ``view`` says where we are."""

    streams: dict[str, jax.Array]
    view: "CacheView"

    def write(self, name: str, new: jax.Array, axes: LogicalAxes) -> "LayerCache":
        """Writes new entries [batch, ...] of one stream, laid out by ``axes``, at the view's slot along
        ``act_cache_length``; the other axes are whole."""
        old, along = self.streams[name], axes.index("act_cache_length") - len(axes)
        new = constrain(new, tuple(None if axis == "act_cache_length" else axis for axis in axes))
        new = new.reshape(*old.shape[:along], -1, *old.shape[along:][1:]).astype(old.dtype)
        written = jax.lax.dynamic_update_slice_in_dim(old, new, self.view.slot, old.ndim + along)
        written = written if written.ndim < len(axes) else constrain(written, axes)
        return LayerCache({**self.streams, name: written}, self.view)

    def put(self, name: str, whole: jax.Array, axes: LogicalAxes) -> "LayerCache":
        """Writes all of one stream, laid out by ``axes``, once: what an encoder gave."""
        whole = constrain(whole.astype(self.streams[name].dtype), axes)
        return LayerCache({**self.streams, name: whole}, self.view)


def cached_heads(batch: int, heads: int) -> tuple[int, ...]:
    """The leading axes of a stream with heads: [batch, heads] on a mesh, which may split both.

    On one device they are one axis, because XLA:CPU drops axes of size 1 (a batch of one, a single key head), and what
    it puts in their place between the write and the products makes it copy the stream every step.
    """
    sharding = current()
    return (batch * heads,) if sharding is None or sharding.mesh.size == 1 else (batch, heads)


VIEW = ["positions", "segments", "slot", "memory_positions", "memory_segments"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=VIEW, meta_fields=[])
@dataclass(frozen=True)
class CacheView:
    """What all layers' caches share: int32 [batch, slots] positions and segments (0: nothing there), the next slot;
    and int32 [batch, memory] positions and segments of what the encoder gave."""

    positions: jax.Array
    segments: jax.Array
    slot: jax.Array
    memory_positions: jax.Array
    memory_segments: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "view"], meta_fields=[])
@dataclass(frozen=True)
class Cache:
    """A model's cache: each layer's streams, and the view that they share."""

    layers: tuple[Streams, ...]
    view: CacheView

    def advance(self, positions: jax.Array, segments: jax.Array) -> "Cache":
        """The cache with the coming input's positions and segments [batch, length] entered in the view."""
        view = self.view
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=view.slot, axis=1)
        view = replace(view, positions=put(view.positions, positions), segments=put(view.segments, segments))
        return Cache(self.layers, view)

    def remember(self, positions: jax.Array, segments: jax.Array) -> "Cache":
        """The cache with the encoder's positions and segments [batch, memory] in the view."""
        return Cache(self.layers, replace(self.view, memory_positions=positions, memory_segments=segments))

    def written(self, layers: tuple[Streams, ...], length: int) -> "Cache":
        """The cache after every layer wrote ``length`` entries."""
        return Cache(layers, replace(self.view, slot=self.view.slot + length))


def empty_view(batch: int, slots: int, memory: int = 0) -> CacheView:
    """A view of nothing yet."""
    zeros, nothing = jnp.zeros((batch, slots), jnp.int32), jnp.zeros((batch, memory), jnp.int32)
    return CacheView(zeros, zeros, jnp.int32(0), nothing, nothing)
