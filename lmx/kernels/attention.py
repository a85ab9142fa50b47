"""Attention: one entry point. Structure (mask type, segments) goes in, never a [length, length] array."""

import math

import jax
import jax.numpy as jnp

from lmx.kernels.masks import Mask

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row with nothing to see gives no NaN


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Mask,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped heads (Vaswani et al. 2017, 3.2.1; Ainslie et al. 2023).

    Args:
      query: [batch, query_length, heads, head_dim].
      key: [batch, key_length, kv_heads, head_dim]; ``heads`` is a multiple of ``kv_heads``.
      value: [batch, key_length, kv_heads, head_dim].
      mask: which positions see which, within a segment.
      query_positions: int32 [batch, query_length]; likewise key_positions [batch, key_length].
      query_segments: int32 [batch, query_length]; likewise key_segments [batch, key_length]. 0 is padding, never seen.
      scale: multiplies the scores; 1 / sqrt(head_dim) by default.
      dropout: share of attention probabilities set to zero while ``dropout_key`` is given.
      dropout_key: a PRNG key, or None for no dropout.

    Returns:
      [batch, query_length, heads, head_dim], in the query's dtype; the softmax is float32.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    grouped = (query * scale).reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32)
    seen = mask.allowed(query_positions[:, :, None], key_positions[:, None, :])
    seen &= (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments > 0)[:, None, :]
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    probabilities = jax.nn.softmax(scores, axis=-1)
    if dropout_key is not None and dropout > 0:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout, probabilities.shape)
        probabilities = jnp.where(kept, probabilities / (1 - dropout), 0)
    out = jnp.einsum("bkgqs,bskd->bqkgd", probabilities.astype(value.dtype), value)
    return out.reshape(batch, length, heads, head_dim)
