"""The experts of a mixture, and the rows that go through them."""

import abc
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmx.kernels.grouped_matmul import grouped_matmul
from lmx.kernels.moving import move
from lmx.nn.activation import Gating
from lmx.nn.module import Declarations, parameter
from lmx.sharding.rules import LogicalAxes


class Rows(abc.ABC):
    """Copies of tokens, laid out by expert."""

    hidden: jax.Array
    """[..., embed]."""

    @abc.abstractmethod
    def matmul(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Each row [..., in] times its expert's kernel of [experts, in, out]: [..., out]."""

    @abc.abstractmethod
    def spread(self, bias: jax.Array) -> jax.Array:
        """Each row's expert's bias of [experts, out]: broadcasts to [..., out]."""


class GroupedRows(Rows):
    """Rows [rows, embed] sorted by expert, int32 ``sizes`` [experts] of each; those past their sum are nobody's."""

    def __init__(self, hidden: jax.Array, sizes: jax.Array):
        self.hidden, self.sizes = hidden, sizes

    def matmul(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return grouped_matmul(x, kernel, self.sizes)

    def spread(self, bias: jax.Array) -> jax.Array:
        rows = jnp.arange(self.hidden.shape[0])
        expert = jnp.searchsorted(jnp.cumsum(self.sizes), rows, side="right")
        return bias.at[expert].get(mode="fill", fill_value=0)


class SortedRows(GroupedRows):
    """All choices [batch, length, k] of the tokens [batch, length, embed], sorted by expert.

    Those of padding, which chooses an expert past the end, come last and hold 0.
    """

    def __init__(self, x: jax.Array, choices: jax.Array, experts: int):
        self.shape = (*choices.shape, x.shape[-1])
        flat = choices.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        self.there = jnp.where(flat[order] < experts, order, flat.size)
        self.back = jnp.where(flat < experts, jnp.argsort(order), flat.size)
        copies = jnp.broadcast_to(x[:, :, None], self.shape).reshape(flat.size, -1)
        super().__init__(move(copies, self.there, self.back), jnp.bincount(flat, length=experts))

    def collect(self, y: jax.Array) -> jax.Array:
        """Rows [batch * length * k, embed] back to their choices [batch, length, k, embed]; 0 for padding's."""
        return move(y, self.back, self.there).reshape(self.shape)


class ExpertLinear(nnx.Module):
    """A linear map for each expert: kernel [experts, in, out], bias [experts, out]."""

    def __init__(self, shape: tuple[int, int, int], axes: LogicalAxes, std: float, bias: bool, declared: Declarations):
        self.kernel = parameter(declared, shape, axes, nnx.initializers.normal(std))
        bias_axes = ("expert", "norm" if axes[-1] == "embed" else axes[-1])
        self.bias = parameter(declared, (shape[0], shape[2]), bias_axes, nnx.initializers.zeros) if bias else None

    def __call__(self, rows: Rows, x: jax.Array) -> jax.Array:
        y = rows.matmul(x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + rows.spread(self.bias[...].astype(x.dtype))


class Experts(nnx.Module):
    """Rows -> their experts' outputs, in the rows' layout."""

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        *,
        gating: Gating,
        bias: bool,
        std: float,
        out_std: float,
        declared: Declarations,
    ):
        self.gating = gating
        linear = functools.partial(ExpertLinear, bias=bias, declared=declared)
        into, out = (experts, width, hidden), (experts, hidden, width)
        self.gate = linear(into, ("expert", "embed", "mlp"), std)
        self.up = linear(into, ("expert", "embed", "mlp"), std)
        self.down = linear(out, ("expert", "mlp", "embed"), out_std)

    def __call__(self, rows: Rows) -> jax.Array:
        return self.down(rows, self.gating(self.gate(rows, rows.hidden), self.up(rows, rows.hidden)))

    @property
    def count(self) -> int:
        """How many there are; in a region that is manual over the experts' axes, how many are here."""
        return int(self.gate.kernel.shape[0])


def split_experts(experts: Experts) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The module as its structure, to be merged again, its parameters, and their logical axes."""
    graph, state = nnx.split(experts)
    is_leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    axes = jax.tree.map(lambda v: v.get_metadata()["axes"], state, is_leaf=is_leaf)
    return graph, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)
