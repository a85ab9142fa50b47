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
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmx.errors import UserError

LogicalAxes = tuple[str | None, ...]
"""One name for each dimension of an array; ``None`` is never sharded."""


def are_axes(x: Any) -> bool:
    """Whether this node of a tree is one array's logical axes."""
    return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


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
    rank: tuple[str, ...] = ()
    """Parameters: the rank of an adapter."""
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
    act_cache_batch: tuple[str, ...] = ("slice", "data", "fsdp", "expert", "stage")
    """Activations: sequences of the batch where attention reads a cache; the cache too."""
    act_cache_heads: tuple[str, ...] = ("tensor",)
    """Activations: query heads there."""
    act_cache_kv_heads: tuple[str, ...] = ("tensor",)
    """Activations: the cache's key and value heads."""
    act_cache_length: tuple[str, ...] = ("sequence",)
    """Activations: the cache's positions."""
    sequence_attention: SequenceAttention = "ring"
    """How attention works where act_length is split: keys and values travel around (ring), are gathered (all_gather),
    or the heads are split instead (all_to_all)."""

    def spec(self, axes: LogicalAxes, without: Collection[str] = ()) -> PartitionSpec:
        """The partition of an array with these logical axes; the mesh axes of ``without`` have no part in it."""
        return PartitionSpec(*(self._mesh_axes(name, without) for name in axes))

    @property
    def parameter_axes(self) -> frozenset[str]:
        """The mesh axes that cut parameters."""
        names = [f.name for f in fields(self) if not f.name.startswith("act_") and f.name != "sequence_attention"]
        return frozenset(axis for name in names for axis in getattr(self, name))

    def _mesh_axes(self, name: str | None, without: Collection[str]) -> tuple[str, ...] | str | None:
        if name is None:
            return None
        axes = tuple(axis for axis in getattr(self, name) if axis not in without)
        return axes[0] if len(axes) == 1 else (axes or None)

    def unrolled(self) -> "Rules":
        """The same where tokens come one by one through unrolled layers, as in decoding.

        A length of one token is not split, only the cache's is; and what would split the stacked ``layers`` splits
        ``embed`` in their place.
        """
        embed = (*self.embed, *(axis for axis in self.layers if axis not in self.embed))
        return replace(self, embed=embed, act_length=(), act_residual=())


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
        return jax.tree.map(self.named, axes, is_leaf=are_axes)

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

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are CPUs."""
        return bool(self.mesh.devices.flat[0].platform == "cpu")

    def check_length(self, length: int) -> None:
        """Raises UserError if the mesh does not divide sequences of this length (tokens)."""
        for name in ("act_length", "act_residual"):
            ways = self.ways(name)
            if length % ways:
                raise UserError(
                    f"the mesh splits '{name}' into {ways} (mesh axes {', '.join(self.axes(name))}), which does not "
                    f"divide the length {length}; the nearest length that it divides is "
                    f"{nearest_multiple(length, ways)}"
                )

    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def check_divides(self, axes: Any, shapes: Any) -> None:
        """Raises UserError for the first parameter that the mesh does not divide, named with its axis and sizes."""
        leaves = jax.tree.leaves_with_path(axes, is_leaf=are_axes)
        for (path, names), shape in zip(leaves, jax.tree.leaves(shapes), strict=True):
            for name, size in zip(names, shape.shape, strict=True):
                if name is not None and size % self.ways(name):
                    where = jax.tree_util.keystr(path, simple=True, separator="/")
                    raise UserError(
                        f"the mesh splits the axis '{name}' of {where} into {self.ways(name)} (mesh axes "
                        f"{', '.join(getattr(self.rules, name))}), which does not divide its size {size}; "
                        f"choose a mesh that splits it into {nearest_ways(size, self.ways(name))}, the nearest number "
                        f"that divides it, or set --rules.{name.replace('_', '-')} to no axes"
                    )

    def put(self, array: Any, axes: LogicalAxes = ()) -> jax.Array:
        """An array of the host, the same in every process, as a global one that is laid out by these logical axes."""
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, self.named(axes), lambda index: host[index])

    def whole(self, array: jax.Array) -> jax.Array:
        """The array such that every process can read all of it; as it is where there is one process."""
        if array.is_fully_addressable:
            return array
        return cast(jax.Array, jax.jit(lambda a: a, out_shardings=self.replicated())(array))


def nearest_multiple(size: int, ways: int) -> int:
    """The number nearest to ``size`` that ``ways`` divides, but 0."""
    return max(ways, round(size / ways) * ways)


def nearest_ways(size: int, ways: int) -> int:
    """The number nearest to ``ways`` that divides ``size``; of two, the smaller."""
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - ways), n))


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
    """The array, laid out by the current rules for these logical axes (one name or ``None`` for each dimension).

    Raises:
      UserError: the mesh does not divide it.
    """
    sharding = _current.get()
    if sharding is None or sharding.mesh.size == 1:
        return array
    return _laid(sharding, array, sharding.rules.spec(axes, manual_axes()), axes)


def exchange(array: jax.Array, source: LogicalAxes, target: LogicalAxes, *, back: bool = False) -> jax.Array:
    """An array that is laid out for ``source``, laid out for ``target``: where a mesh axis goes from one dimension to
    another, by an all-to-all. ``back`` says that it is on its way back.

    XLA's partitioner does so where nothing else changes in the same step, and gathers the array otherwise. So between
    the two the array lies as for ``source``, split further by those axes of ``target`` that nothing has yet.
    """
    sharding = _current.get()
    if sharding is None or sharding.mesh.size == 1:
        return array
    here, there = (sharding.rules.spec(axes, manual_axes()) for axes in (source, target))
    first, last = (there, here) if back else (here, there)
    taken = {axis for part in first for axis in _listed(part)}
    middle = [
        tuple(dict.fromkeys((*(a for a in _listed(t) if a not in taken or a in _listed(s)), *_listed(s))))
        for s, t in zip(first, last, strict=True)
    ]
    names = target if back else source
    return _laid(sharding, _laid(sharding, array, PartitionSpec(*middle), names), there, target)


def _laid(sharding: Sharding, array: jax.Array, spec: PartitionSpec, axes: LogicalAxes) -> jax.Array:
    for name, size, part in zip(axes, array.shape, spec, strict=True):
        ways = math.prod(sharding.mesh.shape.get(axis, 1) for axis in _listed(part))
        if size % ways:
            raise UserError(
                f"the mesh splits '{name}' into {ways} (mesh axes {', '.join(_listed(part))}), which does not divide "
                f"its size {size}; choose a mesh that splits it into {nearest_ways(size, ways)}, the nearest number "
                f"that divides it, or set --rules.{str(name).replace('_', '-')} to other axes"
            )
    manual = manual_axes()
    if not manual:
        return jax.lax.with_sharding_constraint(array, NamedSharding(sharding.mesh, spec))
    if manual >= set(sharding.mesh.axis_names):
        return array
    return jax.lax.with_sharding_constraint(array, spec)


def _listed(part: Any) -> tuple[str, ...]:
    """What a dimension's part of a PartitionSpec names."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def split_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that cut a logical axis into more than one piece, manual ones too; none outside
    ``use_sharding``."""
    sharding = _current.get()
    return () if sharding is None else sharding.axes(name)


def total(x: jax.Array, name: str) -> jax.Array:
    """The sum over the parts of a logical axis in a region that is manual over it; elsewhere ``x``, which is of all."""
    axes = tuple(axis for axis in split_axes(name) if axis in manual_axes())
    return jax.lax.psum(x, axes) if axes else x


def ways(name: str) -> int:
    """How many pieces the current rules cut a logical axis into, of what is seen here (manual axes do not count); 1
    outside ``use_sharding``."""
    sharding, manual = _current.get(), manual_axes()
    return 1 if sharding is None else math.prod(sharding.mesh.shape[a] for a in sharding.axes(name) if a not in manual)
