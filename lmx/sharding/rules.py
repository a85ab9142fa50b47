"""Logical axis rules: which mesh axes each named axis of a parameter or an activation is laid on.

Parameters and activations name their axes differently (``embed`` and ``act_embed``), so that a rule for one never
shards the other by accident. ``constrain`` is what model code calls; outside ``use_sharding`` it does nothing.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmx.errors import UserError

LogicalAxes = tuple[str | None, ...]
"""One name for each dimension of an array; ``None`` is never sharded."""


@dataclass(frozen=True)
class Rules:
    """The rule table: logical axis -> the mesh axes that split it. Data, so that a recipe may replace any of it."""

    embed: tuple[str, ...] = ("fsdp",)
    """Parameters: the residual stream's width."""
    mlp: tuple[str, ...] = ("tensor",)
    """Parameters: hidden units of the feed-forward layers."""
    heads: tuple[str, ...] = ("tensor",)
    """Parameters: query heads."""
    kv_heads: tuple[str, ...] = ("tensor",)
    """Parameters: key and value heads."""
    head_dim: tuple[str, ...] = ()
    """Parameters: the width of a head."""
    q_lora: tuple[str, ...] = ()
    """Parameters: the latent of the queries in multi-head latent attention."""
    kv_lora: tuple[str, ...] = ()
    """Parameters: the latent of the keys and values."""
    expert: tuple[str, ...] = ()
    """Parameters: the experts of a mixture."""
    classes: tuple[str, ...] = ()
    """Parameters: the outputs of a task head."""
    vocab: tuple[str, ...] = ("tensor",)
    """Parameters: the vocabulary."""
    position: tuple[str, ...] = ()
    """Parameters: learned positions."""
    norm: tuple[str, ...] = ()
    """Parameters: scales and biases as wide as the residual stream."""
    layers: tuple[str, ...] = ()
    """Parameters: the stacked layers that a scan runs over."""
    act_batch: tuple[str, ...] = ("data", "fsdp")
    """Activations: sequences of the batch."""
    act_length: tuple[str, ...] = ()
    """Activations: positions in the sequence."""
    act_embed: tuple[str, ...] = ()
    """Activations: the residual stream."""
    act_heads: tuple[str, ...] = ("tensor",)
    """Activations: query heads."""
    act_kv_heads: tuple[str, ...] = ("tensor",)
    """Activations: key and value heads."""
    act_mlp: tuple[str, ...] = ("tensor",)
    """Activations: hidden units of the feed-forward layers."""
    act_expert: tuple[str, ...] = ()
    """Activations: the experts of a mixture."""
    act_vocab: tuple[str, ...] = ("tensor",)
    """Activations: logits."""

    def spec(self, axes: LogicalAxes) -> PartitionSpec:
        """The partition of an array with these logical axes."""
        return PartitionSpec(*(self._mesh_axes(name) for name in axes))

    def _mesh_axes(self, name: str | None) -> tuple[str, ...] | str | None:
        if name is None:
            return None
        axes = getattr(self, name)
        return axes[0] if len(axes) == 1 else (axes or None)


@dataclass(frozen=True)
class Sharding:
    """A mesh and the rules that lay logical axes on it."""

    mesh: Mesh
    rules: Rules

    def named(self, axes: LogicalAxes) -> NamedSharding:
        """The sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.rules.spec(axes))

    def tree(self, axes: Any) -> Any:
        """The shardings of a tree of logical axes."""
        return jax.tree.map(self.named, axes, is_leaf=lambda x: isinstance(x, tuple))

    def ways(self, name: str) -> int:
        """How many pieces a logical axis is cut into. Raises UserError for a rule that names no axis of the mesh."""
        axes = getattr(self.rules, name)
        for axis in axes:
            if axis not in self.mesh.shape:
                raise UserError(
                    f"rules.{name} names the mesh axis {axis!r}, expected some of {', '.join(self.mesh.axis_names)}"
                )
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def check_divides(self, axes: Any, shapes: Any) -> None:
        """Raises UserError for the first parameter that the mesh does not divide, named with its axis and sizes."""
        leaves = jax.tree.leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
        for (path, names), shape in zip(leaves, jax.tree.leaves(shapes), strict=True):
            for name, size in zip(names, shape.shape, strict=True):
                if name is not None and size % self.ways(name):
                    where = jax.tree_util.keystr(path, simple=True, separator="/")
                    raise UserError(
                        f"the mesh splits the axis '{name}' of {where} into {self.ways(name)} (mesh axes "
                        f"{', '.join(getattr(self.rules, name))}), which does not divide its size {size}; "
                        f"choose a mesh that divides it, or set --rules.{name} to no axes"
                    )


_current: contextvars.ContextVar[Sharding | None] = contextvars.ContextVar("sharding", default=None)


@contextlib.contextmanager
def use_sharding(sharding: Sharding | None) -> Iterator[None]:
    """Within the block (where a function is traced), ``constrain`` lays arrays out by this mesh and these rules."""
    token = _current.set(sharding)
    try:
        yield
    finally:
        _current.reset(token)


def constrain(array: jax.Array, axes: LogicalAxes) -> jax.Array:
    """The array, laid out by the current rules for these logical axes (one name or ``None`` for each dimension)."""
    sharding = _current.get()
    if sharding is None or sharding.mesh.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, sharding.named(axes))


def ways(name: str) -> int:
    """How many pieces the current rules cut a logical axis into; 1 outside ``use_sharding``."""
    sharding = _current.get()
    return 1 if sharding is None else sharding.ways(name)
