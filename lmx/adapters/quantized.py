"""Frozen kernels in 8 and 4 bits, made arrays again in the layer that multiplies by them."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.nn.kernel import Kernel
from lmx.optim.matrices import Matrix
from lmx.sharding.rules import LogicalAxes

BLOCK, SECOND_BLOCK = 64, 256
"""Entries that share an absmax, and absmaxes that share a scale (Dettmers et al. 2023, section 3)."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 4-bit NormalFloat: quantiles of a normal distribution, with an exact zero (Dettmers et al. 2023, appendix E)."""
FLOAT8 = jnp.float8_e4m3fn
MOST = float(jnp.finfo(FLOAT8).max)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "absmax"], meta_fields=[])
@dataclass(frozen=True)
class Int8(Kernel):
    """``codes / 127 * absmax``.

    Attributes:
      codes: int8 [*lead, *inputs, *outputs].
      absmax: float32 [*lead, 1, ..., *outputs], of each output's column.
    """

    codes: Any
    absmax: Any

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The kernel, as near as the codes have it."""
        return (self.codes.astype(jnp.float32) * (self.absmax / 127)).astype(dtype)

    @classmethod
    def of(cls, kernel: jax.Array, matrix: Matrix) -> "Int8":
        """The nearest to a kernel."""
        absmax = jnp.max(jnp.abs(kernel.astype(jnp.float32)), matrix.input_axes, keepdims=True)
        codes = jnp.round(kernel / jnp.where(absmax == 0, 1, absmax) * 127).astype(jnp.int8)
        return cls(codes, absmax)

    @classmethod
    def axes(cls, axes: LogicalAxes, matrix: Matrix) -> "Int8":
        """The logical axes of the parts."""
        return cls(axes, tuple(None if i in matrix.input_axes else axis for i, axis in enumerate(axes)))


NF4_DATA = ["codes", "absmax", "absmax_scale", "absmax_mean"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=NF4_DATA, meta_fields=["axis"])
@dataclass(frozen=True)
class Nf4(Kernel):
    """NF4 with double quantization (Dettmers et al. 2023, section 3): blocks of 64 inputs of one output share an
    absmax, and the absmaxes, less their mean, are 8-bit floats of which up to 256 outputs share a scale.

    A length that 64 does not divide has shorter blocks.

    Attributes:
      codes: uint8, two codes each along the last input axis.
      absmax: float8 [*lead, *inputs but the last, blocks, *outputs].
      absmax_scale: float32, the same with the last output axis cut into blocks.
      absmax_mean: float32 [*lead, 1, ...].
      axis: the last input axis, counted from the end, which is the same for one layer and for all of them.
    """

    codes: Any
    absmax: Any
    absmax_scale: Any
    absmax_mean: Any
    axis: int

    @classmethod
    def of(cls, kernel: jax.Array, matrix: Matrix) -> "Nf4":
        """The nearest to a kernel."""
        axis = matrix.input_axes[-1]
        blocks = _cut(kernel.astype(jnp.float32), axis, BLOCK)
        absmax = jnp.max(jnp.abs(blocks), axis + 1)
        mean = jnp.mean(absmax, range(matrix.lead, kernel.ndim), keepdims=True)
        centred = _cut(absmax - mean, kernel.ndim - 1, SECOND_BLOCK)
        scale = jnp.max(jnp.abs(centred), -1) / MOST
        low = (centred / jnp.where(scale == 0, 1, scale)[..., None]).reshape(absmax.shape).astype(FLOAT8)
        exact = _absmax(low, scale, mean)
        shares = blocks / jnp.expand_dims(jnp.where(exact == 0, 1, exact), axis + 1)
        middles = (np.array(NF4[1:]) + np.array(NF4[:-1])) / 2
        codes = sum((shares > middle).astype(jnp.uint8) for middle in middles.astype(np.float32)).reshape(kernel.shape)
        pairs = _cut(codes, axis, 2)
        high, last = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(2))
        return cls(high << 4 | last, low, scale, mean, axis - kernel.ndim)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The kernel, as near as the codes have it."""
        axis = self.codes.ndim + self.axis
        pairs = jnp.stack([self.codes >> 4, self.codes & 15], axis + 1)
        shape = (*self.codes.shape[:axis], 2 * self.codes.shape[axis], *self.codes.shape[axis + 1 :])
        values = jnp.asarray(NF4, jnp.float32)[pairs.reshape(shape)]
        absmax = _absmax(self.absmax, self.absmax_scale, self.absmax_mean)
        blocks = values.reshape(*shape[:axis], absmax.shape[axis], -1, *shape[axis + 1 :])
        return (blocks * jnp.expand_dims(absmax, axis + 1)).reshape(shape).astype(dtype)

    @classmethod
    def axes(cls, axes: LogicalAxes, matrix: Matrix) -> "Nf4":
        """The logical axes of the parts; few blocks are not split along the inputs."""
        axis = matrix.input_axes[-1]
        absmax = (*axes[:axis], None, *axes[axis + 1 :])
        mean = tuple(own if i < matrix.lead else None for i, own in enumerate(axes))
        return cls(axes, absmax, (*absmax[:-1], None), mean, axis - len(axes))


def _cut(x: jax.Array, axis: int, most: int) -> jax.Array:
    """[..., length, ...] -> [..., blocks, size, ...], the size the greatest divisor of both."""
    size = math.gcd(x.shape[axis], most)
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _absmax(low: jax.Array, scale: jax.Array, mean: jax.Array) -> jax.Array:
    """The absmaxes again, from their 8 bits."""
    blocks = low.astype(jnp.float32).reshape(*scale.shape, -1)
    return (blocks * scale[..., None]).reshape(low.shape) + mean


KINDS: dict[str, type[Int8] | type[Nf4]] = {"int8": Int8, "nf4": Nf4}
"""By the name that a configuration has."""
