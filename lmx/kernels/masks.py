"""Which positions may look at which: structure, kept as a type so that a kernel can use it."""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Mask(abc.ABC):
    """Base class. Every mask also keeps segments (documents) apart, and hides padding (segment 0)."""

    def reach(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """The keys of a row, as a range, outside of which its queries ``start`` to ``stop`` see nothing.

        These are places in the row, which positions are not: they start again in each document. But a segment is one
        run of the row along which positions rise, so that two of its places are never further apart than their
        positions are.
        """
        return 0, length

    @property
    def looks_ahead(self) -> bool:
        """Whether a position sees what comes after it."""
        return bool(self.allowed(np.int32(0), np.int32(1)))  # type: ignore[arg-type]

    @abc.abstractmethod
    def allowed(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Whether a query at one position sees a key at another: broadcast int32 positions -> bool."""


@dataclass(frozen=True)
class Bidirectional(Mask):
    """Every position sees its whole segment."""

    def allowed(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """True everywhere."""
        return jnp.ones(jnp.broadcast_shapes(query.shape, key.shape), bool)


@dataclass(frozen=True)
class Causal(Mask):
    """A position sees itself and those before it."""

    def reach(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """Nothing after the last query."""
        return 0, stop

    def allowed(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """key <= query."""
        return key <= query


@dataclass(frozen=True)
class Prefix(Mask):
    """As :class:`Causal`, but that a segment's prefix is seen by all of the segment (Raffel et al. 2020, 3.2.1).

    The positions tell which: those of a prefix are given as ``~position``, which is negative (:func:`in_prefix`).
    """

    def allowed(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """key <= query, or the key is in the prefix; the sign of the query does not count."""
        return (key < 0) | (key <= jnp.where(query < 0, ~query, query))


def in_prefix(positions: jax.Array, prefix: jax.Array) -> jax.Array:
    """Positions as :class:`Prefix` takes them: int32 and bool [batch, length] -> int32 [batch, length]."""
    return jnp.where(prefix, ~positions, positions)


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """A position sees itself and the ``window - 1`` positions before it."""

    window: int = 4096

    def reach(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """Nothing after the last query, nor before the first one's window."""
        return max(0, start - self.window + 1), stop

    def allowed(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """query - window < key <= query."""
        return (key <= query) & (key > query - self.window)


@dataclass(frozen=True)
class BidirectionalWindow(Mask):
    """A position sees those at most ``radius`` away, before and after it.

    ModernBERT's local layers: ``radius`` is half of the ``local_attention`` in its ``config.json``.
    """

    radius: int = 64

    def reach(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """Nothing further than the radius from the first and the last query."""
        return max(0, start - self.radius), min(length, stop + self.radius)

    def allowed(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """|query - key| <= radius."""
        return jnp.abs(query - key) <= self.radius


@dataclass(frozen=True)
class Chunked(Mask):
    """A position sees itself and those before it in its chunk; chunks start at the multiples of ``chunk``."""

    chunk: int = 8192

    def reach(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """Nothing after the last query, nor a whole chunk before the first one, whose chunk may start anywhere."""
        return max(0, start - self.chunk + 1), stop

    def allowed(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """key <= query, and both in one chunk."""
        return (key <= query) & (key // self.chunk == query // self.chunk)
