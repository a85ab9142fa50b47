"""What a run trains: the model itself, or an adapter beside it."""

import abc
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from lmx.adapters.kernels import Added, LowRank, Merged, Summed, column_norms
from lmx.adapters.quantized import KINDS
from lmx.errors import UserError
from lmx.models.model import cast_floats
from lmx.nn.kernel import densed
from lmx.nn.module import Params
from lmx.optim.catalogue import matrices
from lmx.optim.matrices import Matrix
from lmx.optim.names import check_patterns, is_axes, matches, name_of, names
from lmx.sharding.rules import LogicalAxes

BaseDtype = Literal["float32", "bfloat16", "int8", "nf4"]
LEAVES = ("a", "b", "magnitude")
"""Of an adapter, in the place of a kernel."""
TABLE = ("vocab", "embed")
"""The logical axes of a table of tokens."""


@dataclass(frozen=True)
class Adapter(abc.ABC):
    """Base class: a transformation of the parameter tree, and which of its leaves are trained."""

    alone: ClassVar[bool] = False
    """Whether a checkpoint holds only what is trained, and the rest is the model that the run starts from."""

    @abc.abstractmethod
    def check(self, axes: Params) -> None:
        """Raises UserError if it does not fit a model whose parameters have these logical axes."""

    @abc.abstractmethod
    def adapt(self, params: Params, axes: Params, key: jax.Array) -> Params:
        """The parameters that a run has, from the model's. Pure: it may be jitted and its shapes evaluated."""

    @abc.abstractmethod
    def axes(self, axes: Params) -> Params:
        """The logical axes of what :meth:`adapt` makes."""

    @abc.abstractmethod
    def trains(self, name: str) -> bool:
        """Whether the leaf of this name in what :meth:`adapt` makes is trained."""


@dataclass(frozen=True)
class Whole(Adapter):
    """No adapter: the model's own parameters are trained."""

    def check(self, axes: Params) -> None:
        """It fits every model."""

    def adapt(self, params: Params, axes: Params, key: jax.Array) -> Params:
        """The parameters themselves."""
        return params

    def axes(self, axes: Params) -> Params:
        """The axes themselves."""
        return axes

    def trains(self, name: str) -> bool:
        """All of them."""
        return True


@dataclass(frozen=True)
class Lora(Adapter):
    """LoRA (Hu et al. 2021): hidden matrices W become ``W + alpha / rank * a @ b``, and only a and b are trained.

    With ``table_rank`` the tables of tokens have adapters too: what a text has of words of its own is learned there.
    With the base in int8 or nf4 this is QLoRA (Dettmers et al. 2023). The run's ``init_from`` is the base.
    """

    rank: int = 8
    """Columns of a and rows of b."""
    alpha: float = 16.0
    """The product a @ b is multiplied by alpha / rank."""
    table_rank: int = 0
    """Columns of a and rows of b of the tables of tokens, which are scaled as the others are; 0 leaves the tables."""
    targets: tuple[str, ...] = ("*",)
    """Which hidden matrices of the stacks: patterns of their names, as '*attention/query/kernel'."""
    dropout: float = 0.0
    """Dropout on the input of a, in training."""
    base: BaseDtype = "float32"
    """How the base is stored: its hidden matrices so, and the rest, unless this is float32, as bfloat16."""
    also: tuple[str, ...] = ()
    """Patterns of the names of other parameters that are trained in full and kept with the adapter, as 'tasks/*'."""
    start: str = ""
    """A directory of an adapter in PEFT's form to start from."""

    alone: ClassVar[bool] = True

    def check(self, axes: Params) -> None:
        """See :class:`Adapter`."""
        eligible = self._kernels(axes)
        if self.rank < 1 or not self.alpha > 0:
            given = f"adapter.rank is {self.rank} and adapter.alpha {self.alpha}"
            raise UserError(f"{given}, expected a rank of at least 1 and an alpha above 0")
        if self.table_rank < 0:
            raise UserError(f"adapter.table_rank is {self.table_rank}, expected 0 (none) or more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout is {self.dropout}, expected a share from 0 to below 1")
        check_patterns("adapter.targets", self.targets, list(eligible))
        check_patterns("adapter.also", self.also, [name for name in names(axes) if name not in eligible])
        experts = [name for name, matrix in eligible.items() if matrix.lead > 1 and matches(name, self.targets)]
        if self.dropout and experts:
            raise UserError(
                f"adapter.dropout is {self.dropout}, but adapters of experts ({experts[0]}) have none; set it to 0 or "
                "name other adapter.targets"
            )

    def adapt(self, params: Params, axes: Params, key: jax.Array) -> Params:
        """The base as it is stored, with an adapter in the place of each target: a is random, b is 0; of a table, a is
        0, so that each token begins to change by itself."""
        eligible, tables = self._kernels(axes), self._tables(axes)
        order = {name: i for i, name in enumerate(name for name in eligible if matches(name, self.targets))}

        def one(path: Any, kernel: jax.Array) -> Any:
            name = name_of(path)
            if name not in eligible:
                whole = matches(name, self.also) or self.base == "float32"
                base = kernel if whole else _low(path, kernel)
                place = len(order) + tables.index(name) if name in tables else None
                return base if place is None else self._new_table(base, jax.random.fold_in(key, place))
            base = self._stored(kernel, eligible[name])
            if name not in order:
                return base
            return self._new(base, kernel.shape, eligible[name], jax.random.fold_in(key, order[name]))

        return jax.tree.map_with_path(one, params)

    def axes(self, axes: Params) -> Params:
        """See :class:`Adapter`."""
        eligible, tables = self._kernels(axes), self._tables(axes)

        def one(path: Any, own: LogicalAxes) -> Any:
            name = name_of(path)
            if name in tables:
                return self._table_node(own, (own[0], "rank"), ("rank", own[1]))
            if name not in eligible:
                return own
            matrix = eligible[name]
            base: Any = KINDS[self.base].axes(own, matrix) if self.base in KINDS else own
            if not matches(name, self.targets):
                return base
            lead, inputs, outputs = _sides(own, matrix)
            parts = (*lead, *inputs, "rank"), (*lead, "rank", *outputs), (*lead, *outputs)
            return self._node(base, *parts, matrix)

        return jax.tree.map_with_path(one, axes, is_leaf=is_axes)

    def trains(self, name: str) -> bool:
        """The adapters, and what ``also`` names."""
        return name.rpartition("/")[2] in LEAVES or matches(name, self.also)

    def _kernels(self, axes: Params) -> dict[str, Matrix]:
        """The hidden matrices that an adapter may go beside."""
        return {name: matrix for name, matrix in matrices(axes).items() if name.endswith("/kernel")}

    def _tables(self, axes: Params) -> list[str]:
        """The tables that have an adapter."""
        leaves = jax.tree.leaves_with_path(axes, is_leaf=is_axes)
        found = [name_of(path) for path, own in leaves if own == TABLE]
        return [name for name in found if not matches(name, self.also)] if self.table_rank else []

    def _stored(self, kernel: jax.Array, matrix: Matrix) -> Any:
        """The base's kernel."""
        if self.base in KINDS:
            return KINDS[self.base].of(kernel, matrix)
        return kernel.astype(self.base)

    def _new(self, base: Any, shape: tuple[int, ...], matrix: Matrix, key: jax.Array) -> LowRank:
        """An adapter that changes nothing yet; a is drawn as Kaiming's uniform, within 1 / sqrt(inputs)."""
        lead, inputs, outputs = _sides(shape, matrix)
        bound = math.prod(inputs) ** -0.5
        a = jax.random.uniform(key, (*lead, *inputs, self.rank), minval=-bound, maxval=bound)
        magnitude = column_norms(densed(base), matrix.input_axes)
        return self._node(base, a, jnp.zeros((*lead, self.rank, *outputs)), magnitude, matrix)

    def _node(self, base: Any, a: Any, b: Any, magnitude: Any, matrix: Matrix) -> LowRank:
        kind = Added if matrix.lead == 1 else Merged
        return kind(base, a, b, self._magnitude(magnitude), None, matrix.inputs, self.scale, self.dropout)

    def _new_table(self, base: jax.Array, key: jax.Array) -> Summed:
        vocab, width = base.shape
        bound = width**-0.5
        b = jax.random.uniform(key, (self.table_rank, width), minval=-bound, maxval=bound)
        return self._table_node(base, jnp.zeros((vocab, self.table_rank)), b)

    def _table_node(self, base: Any, a: Any, b: Any) -> Summed:
        return Summed(base, a, b, None, None, 1, self.scale, 0.0)

    def _magnitude(self, magnitude: Any) -> Any:
        return None

    @property
    def scale(self) -> float:
        """What a @ b is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Dora(Lora):
    """DoRA (Liu et al. 2024): LoRA for the directions of a matrix's columns, and their lengths trained beside it;
    tables of tokens have no lengths."""

    def _magnitude(self, magnitude: Any) -> Any:
        return magnitude


def _sides(whole: tuple[Any, ...], matrix: Matrix) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """A shape, or axes, as those of lead, inputs and outputs."""
    first, second = matrix.lead, matrix.lead + matrix.inputs
    return whole[:first], whole[first:second], whole[second:]


def _low(path: Any, leaf: jax.Array) -> jax.Array:
    """In bfloat16, but for what must stay exact."""
    return jax.tree.leaves(cast_floats({path[-1].key: leaf}, jnp.bfloat16))[0]
