"""The caches that attention writes while decoding: named streams, so that attention needs no branch on their kind."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Streams = dict[str, dict[str, jax.Array]]
"""What one block caches: by sublayer, its streams by name."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["streams", "view"], meta_fields=[])
@dataclass(frozen=True)
class LayerCache:
    """One layer's cache: ``streams`` maps a name ("key", "value") to its array; ``view`` says where we are."""

    streams: dict[str, jax.Array]
    view: "CacheView"

    def write(self, name: str, new: jax.Array, axis: int) -> "LayerCache":
        """Writes new entries of one stream at the view's slot along ``axis``; its other axes are whole."""
        old = self.streams[name]
        written = jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.view.slot, axis)
        # Without the barrier XLA:CPU writes into two copies of the stream, one to keep and one to read, every step.
        return LayerCache({**self.streams, name: jax.lax.optimization_barrier(written)}, self.view)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["positions", "segments", "slot"], meta_fields=[])
@dataclass(frozen=True)
class CacheView:
    """What all layers' caches share: int32 [batch, slots] positions and segments (0: nothing there), the next slot."""

    positions: jax.Array
    segments: jax.Array
    slot: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "view"], meta_fields=[])
@dataclass(frozen=True)
class Cache:
    """A model's cache: each layer's streams, and the view that they share."""

    layers: tuple[Streams, ...]
    view: CacheView

    def advance(self, positions: jax.Array, segments: jax.Array) -> "Cache":
        """The cache with the coming input's positions and segments [batch, length] entered in the view."""
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=self.view.slot, axis=1)
        view = CacheView(put(self.view.positions, positions), put(self.view.segments, segments), self.view.slot)
        return Cache(self.layers, view)

    def written(self, layers: tuple[Streams, ...], length: int) -> "Cache":
        """The cache after every layer wrote ``length`` entries."""
        view = CacheView(self.view.positions, self.view.segments, self.view.slot + length)
        return Cache(layers, view)


def empty_view(batch: int, slots: int) -> CacheView:
    """A view of nothing yet."""
    zeros = jnp.zeros((batch, slots), jnp.int32)
    return CacheView(zeros, zeros, jnp.int32(0))
