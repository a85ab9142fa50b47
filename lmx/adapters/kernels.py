"""Low-rank adapters in the place of the kernels that they adapt."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from lmx.nn.kernel import Kernel, densed, is_kernel

DATA = ["base", "a", "b", "magnitude", "key"]
META = ["inputs", "scale", "dropout"]


@dataclass(frozen=True)
class LowRank(Kernel):
    """``base + scale * a @ b`` (Hu et al. 2021), with a ``magnitude`` as DoRA has it (Liu et al. 2024, eq. 5).

    Attributes:
      base: the frozen kernel [*lead, *inputs, *outputs], an array or quantized.
      a: [*lead, *inputs, rank].
      b: [*lead, rank, *outputs].
      magnitude: [*lead, *outputs], the length of each output's column; None without DoRA.
      key: uint32 [*lead, 2], raw keys of the dropout; None for none.
      inputs: the number of input axes.
      scale: of the product.
      dropout: share of the inputs that ``a`` does not see.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None
    key: jax.Array | None
    inputs: int
    scale: float
    dropout: float

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The merged kernel."""
        base = densed(self.base, dtype)
        merged = self._summed(base, dtype)
        if self.magnitude is not None:
            merged = merged * jnp.expand_dims(self._gain(merged), self._input_axes).astype(dtype)
        return merged

    def _summed(self, base: jax.Array, dtype: Any) -> jax.Array:
        lead = self.a.shape[: -1 - self.inputs]
        a = self.a.astype(dtype).reshape(*lead, -1, self.a.shape[-1])
        b = self.b.astype(dtype).reshape(*lead, a.shape[-1], -1)
        return base + (self.scale * (a @ b)).astype(dtype).reshape(base.shape)

    @property
    def _input_axes(self) -> tuple[int, ...]:
        first = self.a.ndim - 1 - self.inputs
        return tuple(range(first, first + self.inputs))

    def _gain(self, merged: jax.Array) -> jax.Array:
        """Float32 [*lead, *outputs]: what columns are multiplied by; their norms carry no gradient (section 4.3)."""
        assert self.magnitude is not None
        norms = column_norms(jax.lax.stop_gradient(merged), self._input_axes)
        return self.magnitude.astype(jnp.float32) / norms


class Added(LowRank):
    """Stays in two parts: the product with ``a`` and ``b`` is added to that with the base, and the sum is never made.

    For the kernels that a layer multiplies by as matrices.
    """

    def opened(self, dtype: Any) -> Self:
        """The same, its parts of this dtype; the base becomes an array."""
        return replace(self, base=densed(self.base, dtype), a=self.a.astype(dtype), b=self.b.astype(dtype))

    def astype(self, dtype: Any) -> Self:
        """The same, if it was opened in this dtype."""
        return self if self.a.dtype == dtype else self.opened(dtype)

    def reshape(self, *shape: int) -> Self:
        """The same: it multiplies as a matrix whatever its shape."""
        return self

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] @ self -> [..., outputs], all of them joined."""
        rows, rank = x.shape[-1], self.a.shape[-1]
        y = x @ self.base.reshape(rows, -1)
        low = (self._dropped(x) @ self.a.reshape(rows, rank)) @ self.b.reshape(rank, -1)
        y = y + (self.scale * low).astype(y.dtype)
        if self.magnitude is None:
            return y
        merged = self._summed(jax.lax.stop_gradient(self.base), self.base.dtype)
        return y * self._gain(merged).reshape(-1).astype(y.dtype)

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.key is None:
            return x
        kept = jax.random.bernoulli(jax.random.wrap_key_data(self.key), 1 - self.dropout, x.shape)
        return jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)


class Merged(LowRank):
    """Is summed where a layer begins: for kernels of experts, which layers multiply by in ways of their own."""


class Summed(LowRank):
    """Is summed wherever it is read: for tables of tokens, which are looked up and multiplied by outside of layers."""

    def __getitem__(self, index: Any) -> Any:
        return self.dense(self.a.dtype)[index]


for _kind in (Added, Merged, Summed):
    jax.tree_util.register_dataclass(_kind, DATA, META)


def column_norms(kernel: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Float32 Euclidean norms over the input axes."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axes))


def with_dropout(params: Any, key: jax.Array | None) -> Any:
    """The parameters with a random key in each adapter that has a dropout, another for each layer; no key, no change.

    ``params`` are stacked; a step gives another key. Of a pipeline's microbatches all are dropped alike.
    """
    if key is None:
        return params
    count = iter(range(1 << 30))

    def one(kernel: Any) -> Any:
        if not isinstance(kernel, Added) or not kernel.dropout:
            return kernel
        lead = kernel.a.shape[: -1 - kernel.inputs]
        keys = jax.random.split(jax.random.fold_in(key, next(count)), math.prod(lead))
        return replace(kernel, key=jax.random.key_data(keys).reshape(*lead, -1))

    return jax.tree.map(one, params, is_leaf=is_kernel)
