"""Positions that attention applies to queries and keys."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021), the two halves of a head paired as GPT-NeoX and Llama pair them."""

    theta: float = 10_000.0
    """Base of the wavelengths."""

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates [batch, length, heads, head_dim] by the angles of int32 positions [batch, length]."""
        half = x.shape[-1] // 2
        frequencies = self.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.astype(x.dtype)
