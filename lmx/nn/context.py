"""What a sublayer is told beside its input, and what it gives back."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from lmx.nn.cache import CacheView, LayerCache, empty_view


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hidden", "positions", "segments"], meta_fields=[])
@dataclass(frozen=True)
class Memory:
    """What a decoder looks at in its encoder: hidden states [batch, memory_length, embed] after the encoder's final
    norm, and int32 [batch, memory_length] positions and segments (a row's segment i sees the memory's segment i)."""

    hidden: jax.Array
    positions: jax.Array
    segments: jax.Array

    @property
    def view(self) -> CacheView:
        """The view of a cache that holds this memory and nothing else."""
        view = empty_view(self.positions.shape[0], 0)
        return replace(view, memory_positions=self.positions, memory_segments=self.segments)


@dataclass(frozen=True)
class Context:
    """Beside the hidden states [batch, length, embed]: where they stand, and what may be drawn or remembered.

    ``positions`` and ``segments`` are int32 [batch, length]; segment 0 is padding. ``key`` is None when nothing is
    random (evaluation, decoding). ``cache`` is this sublayer's cache, or None. ``memory`` is the encoder's, None in a
    model without one and where the cache holds it already. ``shared`` are the parameters that belong to the whole
    stack, by name. ``types`` are int32 [batch, length] token types (BERT's sentences), or None for all 0.
    ``prefix`` is bool [batch, length]: what all of its segment sees, under masks that are causal otherwise. ``layer``
    is the layer's number in its stack, from 0.
    """

    positions: jax.Array
    segments: jax.Array
    key: jax.Array | None = None
    cache: LayerCache | None = None
    memory: Memory | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)
    types: jax.Array | None = None
    prefix: jax.Array | None = None
    layer: Any = 0

    @property
    def reach(self) -> int | None:
        """Positions that the rows may come to: the cache's, or None where they are all in ``positions``."""
        return None if self.cache is None else self.cache.view.positions.shape[1]

    def fold(self, index: Any) -> "Context":
        """The same, with a random key of its own for the part number ``index``."""
        return self if self.key is None else replace(self, key=jax.random.fold_in(self.key, index))


@dataclass(frozen=True)
class SublayerOutput:
    """A sublayer's contribution [batch, length, embed], its cache with this input written to it, and what else it
    tells of this input (a router's losses and loads), by name."""

    hidden: jax.Array
    cache: LayerCache | None = None
    aux: Mapping[str, jax.Array] = field(default_factory=dict)
