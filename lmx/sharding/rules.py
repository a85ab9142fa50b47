"""Logical axis rules: which mesh axes each named axis of a parameter or an activation is laid on.

Parameters and activations name their axes differently (``embed`` and ``act_embed``), so that a rule for one never
shards the other by accident. ``constrain`` is what model code calls; outside ``use_sharding`` it does nothing.

Code that runs inside a ``shard_map`` sees only its own shard along the axes that are manual there: for ``constrain``
and ``ways`` those axes are as good as gone, so that the same model code works inside and outside.
"""

import contextlib
import contextvars
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmx.errors import UserError

LogicalAxes = tuple[str | None, ...]
"""One name for each dimension of an array; ``None`` is never sharded."""
SequenceAttention = Literal["ring", "all_gather", "all_to_all"]
"""How attention works over a length that the mesh splits: see :mod:`lmx.kernels.sequence`."""


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
    expert: tuple[str, ...] = ("expert",)
    """Parameters: the experts of a mixture."""
    classes: tuple[str, ...] = ()
    """Parameters: the outputs of a task head."""
    vocab: tuple[str, ...] = ("tensor",)
    """Parameters: the vocabulary."""
    position: tuple[str, ...] = ()
    """Parameters: learned positions."""
    norm: tuple[str, ...] = ()
    """Parameters: scales and biases as wide as the residual stream."""
    layers: tuple[str, ...] = ("stage",)
    """Parameters: the stacked layers that a scan runs over."""
    act_batch: tuple[str, ...] = ("slice", "data", "fsdp", "expert", "stage")
    """Activations: sequences of the batch. Outside of the pipeline, stages share its rows as replicas would."""
    act_expert_batch: tuple[str, ...] = ("slice", "data", "fsdp", "stage")
    """Activations: sequences of the batch where ``act_expert`` is an axis of its own."""
    act_length: tuple[str, ...] = ("sequence",)
    """Activations: positions in the sequence."""
    act_residual: tuple[str, ...] = ("sequence",)
    """Activations: positions in the sequence on the residual stream, between the sublayers and in their norms."""
    act_embed: tuple[str, ...] = ()
    """Activations: the residual stream."""
    act_heads: tuple[str, ...] = ("tensor",)
    """Activations: query heads."""
    act_kv_heads: tuple[str, ...] = ("tensor",)
    """Activations: key and value heads."""
    act_mlp: tuple[str, ...] = ("tensor",)
    """Activations: hidden units of the feed-forward layers."""
    act_expert: tuple[str, ...] = ("expert",)
    """Activations: the experts of a mixture."""
    act_vocab: tuple[str, ...] = ("tensor",)
    """Activations: logits."""
    sequence_attention: SequenceAttention = "ring"
    """How attention works where act_length is split: keys and values travel around (ring), are gathered (all_gather),
    or the heads are split instead (all_to_all)."""

    def spec(self, axes: LogicalAxes, without: Collection[str] = ()) -> PartitionSpec:
        """The partition of an array with these logical axes; the mesh axes of ``without`` have no part in it."""
        return PartitionSpec(*(self._mesh_axes(name, without) for name in axes))

    def _mesh_axes(self, name: str | None, without: Collection[str]) -> tuple[str, ...] | str | None:
        if name is None:
            return None
        axes = tuple(axis for axis in getattr(self, name) if axis not in without)
        return axes[0] if len(axes) == 1 else (axes or None)


PRESETS = {
    "default": Rules(),
    "sequence_norms": Rules(act_residual=("sequence", "tensor")),
}
"""Rule tables by name. ``sequence_norms`` splits the residual stream's length over ``tensor`` too, where the default
holds it whole: norms, residual additions and what the backward pass keeps of them take 1 / tensor of the work and the
memory, and the all-reduces become reduce-scatters and all-gathers (Korthikanti et al. 2022, 4.2)."""


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
        return math.prod(self.mesh.shape[axis] for axis in self.axes(name))

    def axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes that cut a logical axis into more than one piece.

        Raises UserError for a rule that names no axis of the mesh.
        """
        axes = getattr(self.rules, name)
        for axis in axes:
            if axis not in self.mesh.shape:
                raise UserError(
                    f"rules.{name} names the mesh axis {axis!r}, expected some of {', '.join(self.mesh.axis_names)}"
                )
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    def check_length(self, length: int) -> None:
        """Raises UserError if the mesh does not divide sequences of this length (tokens)."""
        for name in ("act_length", "act_residual"):
            ways = self.ways(name)
            if length % ways:
                near = max(ways, round(length / ways) * ways)
                raise UserError(
                    f"the mesh splits '{name}' into {ways} (mesh axes {', '.join(self.axes(name))}), which does not "
                    f"divide the length {length}; the nearest length that it divides is {near}"
                )

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


def current() -> Sharding | None:
    """The sharding of the innermost ``use_sharding``, or None."""
    return _current.get()


def manual_axes() -> frozenset[str]:
    """The mesh axes along which the code being traced sees only its own shard: those of the ``shard_map`` around it."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def constrain(array: jax.Array, axes: LogicalAxes) -> jax.Array:
    """The array, laid out by the current rules for these logical axes (one name or ``None`` for each dimension)."""
    sharding = _current.get()
    if sharding is None or sharding.mesh.size == 1:
        return array
    manual = manual_axes()
    if not manual:
        return jax.lax.with_sharding_constraint(array, sharding.named(axes))
    if manual >= set(sharding.mesh.axis_names):
        return array
    return jax.lax.with_sharding_constraint(array, sharding.rules.spec(axes, manual))


def split_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that cut a logical axis into more than one piece, manual ones too; none outside
    ``use_sharding``."""
    sharding = _current.get()
    return () if sharding is None else sharding.axes(name)


def ways(name: str) -> int:
    """How many pieces the current rules cut a logical axis into, of what is seen here (manual axes do not count); 1
    outside ``use_sharding``."""
    sharding, manual = _current.get(), manual_axes()
    return 1 if sharding is None else math.prod(sharding.mesh.shape[a] for a in sharding.axes(name) if a not in manual)
