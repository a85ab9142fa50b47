"""Experts on a mesh: one region in which every device works on its own tokens and knows its own experts.

It is manual over every axis of the mesh (that the region around, a pipeline's, is not manual over already): what is
sorted is never more than one device's tokens, and platform kernels, which the compiler could not partition, see whole
operands. Inside:

- tokens are cut along the axes of ``act_batch`` and ``act_length``, where these divide them;
- kernels come cut by their own rules. Along the axes of ``embed`` they are gathered, as everywhere else; along those of
  ``mlp`` they stay cut, and the results are summed over them after the choices of a token are combined;
- experts stay cut along the axes of ``expert``: rows are exchanged, or where these axes do not cut the tokens (a batch
  too small to divide), every device serves those choices that are its experts', and the results are summed.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from lmx.nn.experts import Experts, split_experts
from lmx.sharding.rules import LogicalAxes, Sharding, current, manual_axes

Axes = tuple[str, ...]


class Mixed(NamedTuple):
    """What experts make of tokens: the weighted sums [batch, length, embed], and float32 ``dropped``, choices that are
    not honoured."""

    hidden: jax.Array
    dropped: jax.Array


class Place(NamedTuple):
    """What ``local`` must know of where it runs.

    Attributes:
      experts: how many the choices are of; the first that is nobody's.
      exchange: the mesh axes along which other devices own the other experts; none where all are here.
      platform: of the devices.
    """

    experts: int
    exchange: Axes = ()
    platform: str = "cpu"


Local = Callable[[Experts, Place, jax.Array, jax.Array, jax.Array], Mixed]
"""(experts, place, x, choices, weights) -> Mixed, of one device's tokens."""


@dataclass(frozen=True)
class Cut:
    """How the mesh cuts one call: the axes of tokens' batch and length, of the experts, and of their hidden units."""

    sharding: Sharding
    batch: Axes
    length: Axes
    experts: Axes
    units: Axes

    @classmethod
    def of(cls, sharding: Sharding, shape: tuple[int, ...]) -> "Cut":
        """For tokens [batch, length, embed] as they are seen here."""
        manual = manual_axes()
        free = lambda name: tuple(a for a in sharding.axes(name) if a not in manual)  # noqa: E731
        batch, length = free("act_batch"), free("act_length")
        batch = () if shape[0] % _ways(sharding, batch) else batch
        length = () if shape[1] % _ways(sharding, length) else length
        units = tuple(a for a in free("mlp") if a not in (*batch, *length))
        return cls(sharding, batch, length, free("expert"), units)

    @property
    def exchange(self) -> Axes:
        """The experts' axes, if they cut tokens."""
        return self.experts if set(self.experts) & {*self.batch, *self.length} else ()

    @property
    def summed(self) -> Axes:
        """The axes that cut a token's result into parts of a sum."""
        return (*self.units, *(() if self.exchange else self.experts))

    def tokens(self) -> PartitionSpec:
        """Of [batch, length, any]."""
        return PartitionSpec(self.batch or None, self.length or None)

    def param(self, axes: LogicalAxes) -> PartitionSpec:
        """Of a parameter, by its own rule."""
        return self.sharding.rules.spec(axes, manual_axes())

    def gathered(self, param: jax.Array, axes: LogicalAxes, manual: frozenset[str]) -> jax.Array:
        """A parameter, whole along all axes but those of experts and hidden units."""
        for dim, name in enumerate(axes):
            kept = {"expert": self.experts, "mlp": self.units}.get(name or "", ())
            over = tuple(a for a in self.sharding.axes(name) if a not in (*kept, *manual)) if name else ()
            if over:
                param = jax.lax.all_gather(param, over, axis=dim, tiled=True)
        return param


def _ways(sharding: Sharding, axes: Axes) -> int:
    return math.prod(sharding.mesh.shape[a] for a in axes)


def on_each_device(experts: Experts, local: Local, x: jax.Array, choices: jax.Array, weights: jax.Array) -> Mixed:
    """``local`` of all tokens, on one device, or on each of the mesh's of its own.

    Args:
      experts: whole, as the code around sees them.
      local: what is done.
      x: [batch, length, embed].
      choices: int32 [batch, length, k], the number of experts for nobody.
      weights: float32 [batch, length, k].
    """
    sharding, manual = current(), manual_axes()
    if sharding is None or set(sharding.mesh.axis_names) <= manual or sharding.mesh.size == 1:
        return local(experts, Place(experts.count), x, choices, weights)
    cut = Cut.of(sharding, x.shape)
    graph, params, axes = split_experts(experts)
    tokens, parts = cut.tokens(), cut.summed
    specs: Any = jax.tree.map(cut.param, axes, is_leaf=lambda a: isinstance(a, tuple)), tokens, tokens, tokens
    counted = (*cut.batch, *cut.length, *(a for a in parts if a in cut.experts))
    region = jax.shard_map(
        functools.partial(_inside, cut, local, graph, axes, manual, experts.count),
        mesh=jax.sharding.get_abstract_mesh() if manual else sharding.mesh,
        in_specs=specs,
        out_specs=(PartitionSpec(parts or None, *tokens), PartitionSpec(counted or None)),
        axis_names=set(sharding.mesh.axis_names) - manual,
        check_vma=False,
    )
    # Outside of jit, JAX cannot run a region that leaves axes to the compiler.
    hidden, dropped = jax.jit(region)(params, x, choices, weights)
    return Mixed(hidden.sum(0), dropped.sum())


def _inside(
    cut: Cut,
    local: Local,
    graph: Any,
    axes: Any,
    manual: frozenset[str],
    count: int,
    params: Any,
    x: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    params = jax.tree.map(lambda a, names: cut.gathered(a, names, manual), params, axes)
    if cut.units and "bias" in params["down"]:
        first = jax.lax.axis_index(cut.units) == 0
        params["down"]["bias"] = jnp.where(first, params["down"]["bias"], 0)
    experts = cast(Experts, nnx.merge(graph, params))
    if not cut.exchange and cut.experts:
        choices = _own(choices, experts.count, jax.lax.axis_index(cut.experts))
        count = experts.count
    platform = cut.sharding.mesh.devices.flat[0].platform
    out = local(experts, Place(count, cut.exchange, platform), x, choices, weights)
    return out.hidden[None], out.dropped[None]


def _own(choices: jax.Array, count: int, owner: jax.Array) -> jax.Array:
    """The choices as numbers of this owner's experts; nobody's where they are another's."""
    own = choices - owner * count
    return jnp.where((own >= 0) & (own < count), own, count)
