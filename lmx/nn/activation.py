"""Activation functions by name, and gatings: how two projections of a feed-forward layer become one."""

import abc
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    """``x`` times the normal distribution's share below it (Hendrycks and Gimpel 2016, 2), in the dtype of ``x``.

    By erf, as in the published implementations: erfc, which JAX takes, costs CPUs several times as much. At least in
    float32, because ``1 + erf`` cancels below zero.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]
"""Elementwise functions; ``gelu`` is exact, ``gelu_tanh`` its approximation (Hendrycks and Gimpel 2016)."""
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclass(frozen=True)
class Gating(abc.ABC):
    """Base class: what a gate and an up projection, both [..., mlp], make together."""

    @abc.abstractmethod
    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """[..., mlp], in the dtype of its arguments."""


@dataclass(frozen=True)
class Glu(Gating):
    """``activation(gate) * up`` (Shazeer 2020): SwiGLU with silu, GEGLU with gelu."""

    activation: Activation = "silu"

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """[..., mlp]."""
        return ACTIVATIONS[self.activation](gate) * up


@dataclass(frozen=True)
class ClampedGlu(Gating):
    """``gate * sigmoid(alpha * gate) * (up + 1)``, both clamped first, the gate only from above (GPT-OSS 2025)."""

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """[..., mlp]."""
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)
