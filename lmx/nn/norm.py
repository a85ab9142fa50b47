"""Normalisation. Statistics are float32 whatever the input's dtype."""

import abc
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmx.nn.module import Declarations, Part, parameter


@dataclass(frozen=True)
class Norm(abc.ABC):
    """Base class of the norms' specs."""

    eps: float = 1e-5

    @abc.abstractmethod
    def part(self, width: int) -> Part:
        """The module for inputs [..., width]."""


def build_norm(norm: Norm | None, width: int, declared: Declarations) -> Any:
    """The module of a norm for inputs [..., width], or None where there is none."""
    return None if norm is None else norm.part(width).build(declared)


@dataclass(frozen=True)
class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + eps) * scale + bias (Ba et al. 2016)."""

    bias: bool = True

    def part(self, width: int) -> Part:
        """The module for inputs [..., width]."""
        return Part(functools.partial(LayerNormModule, self, width))


@dataclass(frozen=True)
class RmsNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * (offset + scale) (Zhang and Sennrich 2019).

    ``offset`` 1 lets the scale start at, and decay to, zero (Gemma).
    """

    offset: float = 0.0

    def part(self, width: int) -> Part:
        """The module for inputs [..., width]."""
        return Part(functools.partial(RmsNormModule, self, width))


class LayerNormModule(nnx.Module):
    """[..., width] -> [..., width]."""

    def __init__(self, spec: LayerNorm, width: int, declared: Declarations):
        self.eps = spec.eps
        self.scale = parameter(declared, (width,), ("norm",), nnx.initializers.ones)
        self.bias = parameter(declared, (width,), ("norm",), nnx.initializers.zeros) if spec.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class RmsNormModule(nnx.Module):
    """[..., width] -> [..., width]."""

    def __init__(self, spec: RmsNorm, width: int, declared: Declarations):
        self.eps, self.offset = spec.eps, spec.offset
        self.scale = parameter(declared, (width,), ("norm",), nnx.initializers.constant(1 - spec.offset))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (y * (scale + self.offset if self.offset else scale)).astype(x.dtype)
