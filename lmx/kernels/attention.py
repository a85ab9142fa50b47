"""Attention: one entry point. Structure (mask type, segments) goes in, never a [length, length] array of the batch.

Two implementations stand behind it. ``dense`` takes any query against any keys (a cache) and knows dropout. ``blocked``
is for a sequence that attends to itself: it goes through blocks of queries, each against the keys that its mask can
reach, and its backward pass computes the probabilities again from the saved log-sum-exps (Dao et al. 2022), so that
memory grows with block x length and a causal mask costs little more than half of the full square.
"""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmx.kernels.masks import Mask

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row with nothing to see gives no NaN
SAVED = "attention"
"""Name of what the backward pass needs beside the inputs, for rematerialisation policies."""
BLOCKS = 4
"""Blocks that a sequence is cut into: 4 leave 5/8 of a causal square, more save little and compile longer."""
BLOCK_MINIMUM = 128
BLOCK_MAXIMUM = 1024


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
    itself: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped heads (Vaswani et al. 2017, 3.2.1; Ainslie et al. 2023).

    Args:
      query: [batch, query_length, heads, head_dim].
      key: [batch, kv_heads, head_dim, key_length]: keys and values lie as the products take them and as caches keep
        them, so that no step of decoding transposes a cache. ``heads`` is a multiple of ``kv_heads``.
      value: [batch, kv_heads, key_length, head_dim].
      mask: which positions see which, within a segment.
      query_positions: int32 [batch, query_length]; likewise key_positions [batch, key_length].
      query_segments: int32 [batch, query_length]; likewise key_segments [batch, key_length]. 0 is padding, never seen.
      itself: queries and keys are the same positions of the same rows, rising along each segment.
      scale: multiplies the scores; 1 / sqrt(head_dim) by default.
      dropout: share of attention probabilities set to zero while ``dropout_key`` is given.
      dropout_key: a PRNG key, or None for no dropout.

    Returns:
      [batch, query_length, heads, head_dim], in the query's dtype; the softmax is float32.
    """
    query = query * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    drops = dropout_key is not None and dropout > 0
    if itself and not drops:
        return _blocked(mask, query, key, value, query_positions, query_segments)
    seen = _seen(mask, query_positions, key_positions, query_segments, key_segments)
    return _dense(query, key, value, seen, dropout if drops else 0.0, dropout_key)


def _seen(mask: Mask, query_at: jax.Array, key_at: jax.Array, query_in: jax.Array, key_in: jax.Array) -> jax.Array:
    """bool [batch, query, key] from positions and segments of both."""
    same = (query_in[:, :, None] == key_in[:, None, :]) & (key_in > 0)[:, None, :]
    return mask.allowed(query_at[:, :, None], key_at[:, None, :]) & same


def _dense(
    query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array, dropout: float, dropout_key: Any
) -> jax.Array:
    grouped = _heads_first(query, key.shape[1])
    scores = jnp.einsum("bkgqd,bkds->bkgqs", grouped, key, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(jnp.where(seen[:, None, None], scores, MASKED), axis=-1)
    if dropout:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout, probabilities.shape)
        probabilities = jnp.where(kept, probabilities / (1 - dropout), 0)
    return _heads_last(jnp.einsum("bkgqs,bksd->bkgqd", probabilities.astype(value.dtype), value))


def _blocks(mask: Mask, length: int) -> list[tuple[slice, slice]]:
    """Query blocks, each with the keys that it can reach."""
    size = min(max(-(-length // BLOCKS), BLOCK_MINIMUM), BLOCK_MAXIMUM)
    starts = range(0, length, size)
    return [(slice(a, min(a + size, length)), slice(*mask.reach(a, min(a + size, length), length))) for a in starts]


def _heads_first(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, length, heads, head_dim] -> [batch, kv_heads, group, length, head_dim]."""
    batch, length, heads, head_dim = x.shape
    return x.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)


def _heads_last(x: jax.Array) -> jax.Array:
    """The inverse of :func:`_heads_first`."""
    batch, kv_heads, group, length, head_dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)


def _scores(mask: Mask, query: jax.Array, key: jax.Array, at: Any, within: Any, block: Any) -> jax.Array:
    """Float32 masked scores of one block [batch, kv_heads, group, query, key]."""
    rows, columns = block
    scores = jnp.einsum(
        "bkgqd,bkds->bkgqs", query[:, :, :, rows], key[..., columns], preferred_element_type=jnp.float32
    )
    seen = _seen(mask, at[:, rows], at[:, columns], within[:, rows], within[:, columns])
    return jnp.where(seen[:, None, None], scores, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(mask: Mask, query: jax.Array, key: jax.Array, value: jax.Array, at: jax.Array, within: jax.Array) -> Any:
    return _blocked_forward(mask, query, key, value, at, within)[0]


def _blocked_forward(mask: Mask, query: Any, key: Any, value: Any, at: Any, within: Any) -> Any:
    q, k, v = _heads_first(query, key.shape[1]), key, value
    outs, normalisers = [], []
    for block in _blocks(mask, query.shape[1]):
        scores = _scores(mask, q, k, at, within, block)
        top = scores.max(-1, keepdims=True)
        exponentials = jnp.exp(scores - top)
        total = exponentials.sum(-1, keepdims=True)
        out = jnp.einsum("bkgqs,bksd->bkgqd", exponentials.astype(v.dtype), v[:, :, block[1]])
        outs.append(out / total.astype(out.dtype))
        normalisers.append(top + jnp.log(total))
    mixed = checkpoint_name(_heads_last(jnp.concatenate(outs, axis=3)), SAVED)
    normaliser = checkpoint_name(jnp.concatenate(normalisers, axis=3), SAVED)
    return mixed, (query, key, value, mixed, normaliser, at, within)


def _blocked_backward(mask: Mask, residuals: Any, d_mixed: jax.Array) -> Any:
    """Every large product takes the [query, key] block as it lies: transposing one costs more than the product."""
    query, k, v, mixed, normaliser, at, within = residuals
    q, out, d_out = (_heads_first(x, k.shape[1]) for x in (query, mixed, d_mixed))
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_queries = []
    d_key, d_value = (jnp.zeros(k.shape, jnp.float32) for _ in range(2))
    for block in _blocks(mask, query.shape[1]):
        rows, columns = block
        scores = _scores(mask, q, k, at, within, block)
        # A row that sees nothing (padding) has no probabilities to take gradients of.
        p = jnp.where(scores > MASKED, jnp.exp(scores - normaliser[:, :, :, rows]), 0)
        do = d_out[:, :, :, rows]
        dp = jnp.einsum("bkgqd,bksd->bkgqs", do, v[:, :, columns], preferred_element_type=jnp.float32)
        ds = (p * (dp - delta[:, :, :, rows])).astype(q.dtype)
        d_queries.append(jnp.einsum("bkgqs,bkds->bkgqd", ds, k[..., columns]))
        d_value = d_value.at[..., columns].add(_over_queries(do, p.astype(do.dtype)))
        d_key = d_key.at[..., columns].add(_over_queries(q[:, :, :, rows], ds))
    d_query = _heads_last(jnp.concatenate(d_queries, axis=3)).astype(query.dtype)
    return d_query, d_key.astype(k.dtype), d_value.swapaxes(2, 3).astype(v.dtype), None, None


def _over_queries(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[batch, kv_heads, group, query, d], [batch, kv_heads, group, query, key] -> float32 [batch, kv_heads, d, key]."""
    dims = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    product = jax.lax.dot_general(x, weights, dims, preferred_element_type=jnp.float32)
    # XLA:CPU has no bfloat16 product into float32 with the transposition that follows folded in.
    return jax.lax.optimization_barrier(product)


_blocked.defvjp(cast(Any, _blocked_forward), cast(Any, _blocked_backward))
