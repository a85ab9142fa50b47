"""Where the arrays of decoding lie on a mesh: parameters of unrolled layers, prompts, the cache."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import jax

from lmx.errors import UserError
from lmx.models.model import cast_floats, param_shapes, unstack_layers, unstacked_param_axes
from lmx.models.specs import ModelSpec
from lmx.nn.kernel import plain
from lmx.nn.module import Params
from lmx.sharding.rules import Rules, Sharding

CACHE = ("act_cache_batch", "act_cache_heads", "act_cache_kv_heads", "act_cache_length")


@dataclass(frozen=True)
class Places:
    """The mesh, with the rules for unrolled layers.

    Attributes:
      writing: how tokens are written, one by one.
      reading: how prompts are read: the parameters and the cache lie as for writing, activations may not.
    """

    writing: Sharding
    reading: Sharding

    @classmethod
    def of(cls, sharding: Sharding, reading: Rules | None = None) -> "Places":
        """The places of a model that lies by ``sharding``; ``reading`` has the rules of activations for prompts (its
        others play no part), by default the same."""
        rules = sharding.rules.unrolled()
        read = rules if reading is None else _with_activations(rules, reading)
        return cls(Sharding(sharding.mesh, rules), Sharding(sharding.mesh, read))

    @property
    def rows(self) -> int:
        """What the number of prompts must be a multiple of."""
        ways = (s.ways(name) for s in (self.writing, self.reading) for name in ("act_batch", "act_cache_batch"))
        return math.lcm(*ways)

    def check_batch(self, batch: int) -> None:
        """Raises UserError, with the nearest that fits, for a number of prompts that the mesh does not divide."""
        if batch % self.rows:
            near = max(self.rows, round(batch / self.rows) * self.rows)
            raise UserError(
                f"the mesh splits the batch into {self.rows}, which does not divide {batch} prompts; the nearest "
                f"number that it divides is {near}"
            )

    def put(self, by_row: Any, shared: Any) -> tuple[Any, Any]:
        """Arrays of the host as global ones: those with a row for each prompt, and those that all rows share."""
        rows = lambda a: self.reading.put(a, ("act_batch", *[None] * (a.ndim - 1)))  # noqa: E731
        return jax.tree.map(rows, by_row), jax.tree.map(self.reading.put, shared)


@functools.lru_cache(maxsize=8)
def unstacker(spec: ModelSpec, dtype: Any, places: Places | None) -> Callable[[Params], Params]:
    """A compiled function that makes of stacked parameters those that decoding takes: layers unstacked, in the dtype to
    compute in, and on a mesh each device with its part.

    Raises:
      UserError: the mesh does not divide a parameter.
    """

    def make(params: Params) -> Params:
        return cast(Params, unstack_layers(spec, cast_floats(plain(params), dtype)))

    if places is None:
        return jax.jit(make)
    axes = unstacked_param_axes(spec)
    places.writing.check_divides(axes, jax.eval_shape(make, param_shapes(spec)))
    return jax.jit(make, out_shardings=places.writing.tree(axes))


def _with_activations(rules: Rules, reading: Rules) -> Rules:
    """The rules with the activations of ``reading``, but for the cache."""
    activations = {name: axes for name, axes in vars(reading.unrolled()).items() if name.startswith("act_")}
    return replace(rules, **{name: axes for name, axes in activations.items() if name not in CACHE})
