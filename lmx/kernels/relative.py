"""What is added to attention's scores by how far apart query and key are: structure, kept as a type, as masks are."""

import abc
import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lmx.errors import UserError


@dataclass(frozen=True)
class Bias(abc.ABC):
    """Base class. The learned numbers are apart, in a table, so that a stack can share one among its layers."""

    @abc.abstractmethod
    def scores(self, table: jax.Array, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """What is added to the scaled scores.

        Args:
          table: the learned numbers.
          query_positions: int32 [batch, query]; likewise key_positions [batch, key].

        Returns:
          float32 [batch, heads, query, key].
        """


@dataclass(frozen=True)
class RelativeBuckets(Bias):
    """T5's bias (Raffel et al. 2020, 2.1): a number for each head and bucket of distances.

    Half of a direction's buckets hold one distance each, the others distances that grow by equal factors; all from
    ``max_distance`` on share the last. Raises UserError for buckets that ``max_distance`` leaves nothing to do.
    """

    buckets: int = 32
    """Buckets in all: rows of the table [buckets, heads]."""
    max_distance: int = 128
    """Distances from here on are not told apart."""
    bidirectional: bool = True
    """Whether keys after the query have buckets of their own, half of them; if not, they count as distance 0."""

    def __post_init__(self) -> None:
        exact = self._directed // 2
        if exact < 1 or self.max_distance <= exact:
            raise UserError(
                f"{self.buckets} relative buckets and max_distance {self.max_distance} do not fit: buckets must be at "
                f"least {4 if self.bidirectional else 2} and max_distance more than the {exact} distances that have "
                "buckets of their own"
            )

    @property
    def _directed(self) -> int:
        return self.buckets // 2 if self.bidirectional else self.buckets

    def bucket(self, distance: jax.Array) -> jax.Array:
        """The buckets of int32 distances key - query, of any shape."""
        steps = jnp.asarray(_steps(self._directed, self.max_distance))
        if not self.bidirectional:
            return steps[jnp.clip(-distance, 0, self.max_distance)]
        after = jnp.where(distance > 0, self._directed, 0)
        return after + steps[jnp.minimum(jnp.abs(distance), self.max_distance)]

    def scores(self, table: jax.Array, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """The rows of the table [buckets, heads] of every distance, as [batch, heads, query, key]."""
        buckets = self.bucket(key_positions[:, None, :] - query_positions[:, :, None])
        return table.astype(jnp.float32)[buckets].transpose(0, 3, 1, 2)


@functools.cache
def _steps(buckets: int, max_distance: int) -> np.ndarray:
    """int32 [max_distance + 1]: the bucket of each distance in one direction.

    Float32 and in T5's order of operations, because a distance on the edge of two buckets goes where rounding sends it.
    """
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    logs = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    wide = exact + (logs / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(wide, buckets - 1)).astype(np.int32)
