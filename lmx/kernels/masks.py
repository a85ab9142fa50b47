"""Which positions may look at which: structure, kept as a type so that a kernel can use it."""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Mask(abc.ABC):
    """Base class. Every mask also keeps segments (documents) apart, and hides padding (segment 0)."""

    def reach(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """The keys, as a range, outside of which queries ``start`` to ``stop`` of a row see nothing."""
        return 0, length

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
class SlidingWindow(Mask):
    """A position sees itself and the ``window - 1`` positions before it."""

    window: int = 4096

    def reach(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """Nothing after the last query, nor before the first one's window."""
        return max(0, start - self.window + 1), stop

    def allowed(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """query - window < key <= query."""
        return (key <= query) & (key > query - self.window)
