"""What every form of attention shares: how scores are changed and masked, and how heads lie."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmx.kernels.masks import Mask
from lmx.kernels.relative import Bias

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row with nothing to see gives no NaN
SAVED = "attention"
"""Name of what the backward pass needs beside the inputs, for rematerialisation policies."""


@dataclass(frozen=True)
class Scoring:
    """What becomes of scaled scores before the softmax."""

    mask: Mask
    softcap: float | None
    bias: Bias | None

    def changed(self, scores: jax.Array, table: Any, query_at: jax.Array, key_at: jax.Array) -> jax.Array:
        """Float32 scores [batch, kv_heads, group, query, key] with the bias added, then capped."""
        if self.bias is not None:
            scores = scores + self.bias.scores(table, query_at, key_at).reshape(scores.shape)
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        return scores


class Learned(NamedTuple):
    """The parameters inside attention, None where there are none: sinks [heads], and the bias's table."""

    sinks: jax.Array | None
    table: jax.Array | None


class Where(NamedTuple):
    """Where queries and keys stand: int32 [batch, query_length] or [batch, key_length] each; segment 0 is padding."""

    query_at: jax.Array
    key_at: jax.Array
    query_in: jax.Array
    key_in: jax.Array


def seen(mask: Mask, query_at: jax.Array, key_at: jax.Array, query_in: jax.Array, key_in: jax.Array) -> jax.Array:
    """bool [batch, query, key] from positions and segments of both."""
    same = (query_in[:, :, None] == key_in[:, None, :]) & (key_in > 0)[:, None, :]
    return mask.allowed(query_at[:, :, None], key_at[:, None, :]) & same


def by_head(x: jax.Array, scores: jax.Array) -> jax.Array:
    """[heads] -> float32 [kv_heads, group, 1, 1], as the heads of scores [batch, kv_heads, group, query, key] lie."""
    return x.astype(jnp.float32).reshape(*scores.shape[1:3], 1, 1)


def heads_first(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, length, heads, head_dim] -> [batch, kv_heads, group, length, head_dim]."""
    batch, length, heads, head_dim = x.shape
    return x.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)


def heads_last(x: jax.Array) -> jax.Array:
    """The inverse of :func:`heads_first`."""
    batch, kv_heads, group, length, head_dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)


def sinks_gradient(sinks: jax.Array | None, normaliser: jax.Array, delta: jax.Array) -> jax.Array | None:
    """Float32 [heads]: a sink takes its probability from the keys and gives no value back."""
    if sinks is None:
        return None
    probability = jnp.exp(by_head(sinks, normaliser) - normaliser)
    return -(probability * delta).sum((0, 3, 4)).reshape(-1)


def over_queries(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[batch, kv_heads, group, query, d], [batch, kv_heads, group, query, key] -> float32 [batch, kv_heads, d, key]."""
    dims = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    product = jax.lax.dot_general(x, weights, dims, preferred_element_type=jnp.float32)
    # XLA:CPU has no bfloat16 product into float32 with the transposition that follows folded in.
    return jax.lax.optimization_barrier(product)
