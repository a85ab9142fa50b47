"""Attention: one entry point. Structure (mask type, segments) goes in, never a [length, length] array of the batch.

Two implementations stand behind it, and those of :mod:`lmx.kernels.sequence` where the mesh splits the length.
``dense`` takes any query against any keys (a cache) and knows dropout. ``blocked`` is for a sequence that attends to
itself: it goes through blocks of queries, each against the keys that its mask can reach, and its backward pass computes
the probabilities again from the saved log-sum-exps (Dao et al. 2022), so that memory grows with block x length and a
causal mask costs little more than half of the full square.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmx.kernels.masks import Mask
from lmx.kernels.relative import Bias
from lmx.kernels.scoring import (
    MASKED,
    SAVED,
    Learned,
    Scoring,
    Where,
    by_head,
    heads_first,
    heads_last,
    over_queries,
    seen,
    sinks_gradient,
)
from lmx.kernels.sequence import LocalRows, across_shards, whole_keys
from lmx.kernels.telling import tell
from lmx.sharding.rules import split_axes

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
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    bias: Bias | None = None,
    bias_table: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped heads (Vaswani et al. 2017, 3.2.1; Ainslie et al. 2023).

    Args:
      query: [batch, query_length, heads, head_dim].
      key: [batch, kv_heads, head_dim, key_length]: keys and values lie as the products take them and as caches keep
        them, so that no step of decoding transposes a cache. ``heads`` is a multiple of ``kv_heads``. A cache
        has the first two axes as one, [batch * kv_heads, head_dim, key_length], with ``itself`` False.
      value: [batch, kv_heads, key_length, value_dim], or likewise; value_dim may differ from head_dim.
      mask: which positions see which, within a segment.
      query_positions: int32 [batch, query_length]; likewise key_positions [batch, key_length].
      query_segments: int32 [batch, query_length]; likewise key_segments [batch, key_length]. 0 is padding, never seen.
      itself: queries and keys are the same places of the same rows; each segment is one run of its row, and its
        positions rise along it.
      scale: multiplies the scores; 1 / sqrt(head_dim) by default.
      softcap: scores become softcap * tanh(scores / softcap), after the bias (Gemma 2: Riviere et al. 2024, 2).
      sinks: [heads], a logit of each head that takes its part of the softmax and gives no value; neither scaled nor
        capped (GPT-OSS: OpenAI 2025). A query that sees no key then gives 0.
      bias: what is added to the scaled scores by position, from ``bias_table``.
      bias_table: the learned numbers of ``bias``: [buckets, heads].
      dropout: share of attention probabilities set to zero while ``dropout_key`` is given.
      dropout_key: a PRNG key, or None for no dropout.

    Returns:
      [batch, query_length, heads, value_dim], in the query's dtype; the softmax is float32.
    """
    query = query * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scoring, learned = Scoring(mask, softcap, bias), Learned(sinks, bias_table)
    where = Where(query_positions, key_positions, query_segments, key_segments)
    tell("attention" if itself else "cross_attention", lambda: _maps(scoring, query, key, learned, where))
    if dropout_key is not None and dropout > 0:
        key, value, where, rows = whole_keys(key, value, where)
        return _dense(
            scoring, query, key, value, learned, where, functools.partial(_dropped, dropout, dropout_key, rows)
        )
    whole = functools.partial(_itself if itself else _dense, scoring)
    if split_axes("act_length") and key.ndim == 4:
        return across_shards(scoring, query, key, value, learned, where, itself=itself, whole=whole)
    return whole(query, key, value, learned, where)


def _dense(
    scoring: Scoring,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    learned: Learned,
    where: Where,
    dropped: Callable[[jax.Array], jax.Array] = lambda probabilities: probabilities,
) -> jax.Array:
    probabilities = dropped(_probabilities(scoring, query, key, learned, where))
    rows = probabilities.astype(value.dtype).reshape(*key.shape[:-2], -1, probabilities.shape[-1])
    return heads_last(jnp.matmul(rows, value).reshape(*probabilities.shape[:-1], -1))


def _probabilities(scoring: Scoring, query: jax.Array, key: jax.Array, learned: Learned, where: Where) -> jax.Array:
    """Float32 [batch, kv_heads, group, query, key]."""
    grouped = heads_first(query, math.prod(key.shape[:-2]) // query.shape[0])
    rows = grouped.reshape(*key.shape[:-2], -1, query.shape[-1])
    scores = jnp.matmul(rows, key, preferred_element_type=jnp.float32).reshape(*grouped.shape[:-1], -1)
    scores = scoring.changed(scores, learned.table, where.query_at, where.key_at)
    return _softmax(jnp.where(seen(scoring.mask, *where)[:, None, None], scores, MASKED), learned.sinks)


def _maps(scoring: Scoring, query: jax.Array, key: jax.Array, learned: Learned, where: Where) -> jax.Array:
    """What each query takes of each key: float32 [batch, heads, query, key], for those who look inside."""
    found = _probabilities(scoring, query, key, learned, where)
    return found.reshape(found.shape[0], -1, *found.shape[3:])


def _dropped(rate: float, key: jax.Array, rows: LocalRows, probabilities: jax.Array) -> jax.Array:
    kept = rows.of(lambda shape: jax.random.bernoulli(key, 1 - rate, shape), probabilities.shape, 3)
    return jnp.where(kept, probabilities / (1 - rate), 0)


def _itself(scoring: Scoring, query: Any, key: Any, value: Any, learned: Learned, where: Where) -> jax.Array:
    return cast(jax.Array, _blocked(scoring, query, key, value, learned, where.query_at, where.query_in))


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Probabilities of the keys [batch, kv_heads, group, query, key]; the sinks keep what is left."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = by_head(sinks, scores)
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sink))
    exponentials = jnp.exp(scores - top)
    return exponentials / (exponentials.sum(-1, keepdims=True) + jnp.exp(sink - top))


def _blocks(mask: Mask, length: int) -> list[tuple[slice, slice]]:
    """Query blocks, each with the keys that it can reach."""
    size = min(max(-(-length // BLOCKS), BLOCK_MINIMUM), BLOCK_MAXIMUM)
    starts = range(0, length, size)
    return [(slice(a, min(a + size, length)), slice(*mask.reach(a, min(a + size, length), length))) for a in starts]


def _products(query: jax.Array, key: jax.Array, block: Any) -> jax.Array:
    """Float32 scores of one block [batch, kv_heads, group, query, key], as the product gives them."""
    rows, columns = block
    return jnp.einsum("bkgqd,bkds->bkgqs", query[:, :, :, rows], key[..., columns], preferred_element_type=jnp.float32)


def _masked(mask: Mask, scores: jax.Array, at: Any, within: Any, block: Any) -> jax.Array:
    rows, columns = block
    visible = seen(mask, at[:, rows], at[:, columns], within[:, rows], within[:, columns])
    return jnp.where(visible[:, None, None], scores, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(
    scoring: Scoring, query: jax.Array, key: jax.Array, value: jax.Array, learned: Learned, at: Any, within: Any
) -> Any:
    return _blocked_forward(scoring, query, key, value, learned, at, within)[0]


def _blocked_forward(scoring: Scoring, query: Any, key: Any, value: Any, learned: Learned, at: Any, within: Any) -> Any:
    q, k, v = heads_first(query, key.shape[1]), key, value
    outs, normalisers = [], []
    for block in _blocks(scoring.mask, query.shape[1]):
        scores = scoring.changed(_products(q, k, block), learned.table, at[:, block[0]], at[:, block[1]])
        scores = _masked(scoring.mask, scores, at, within, block)
        top = scores.max(-1, keepdims=True)
        if learned.sinks is not None:
            sink = by_head(learned.sinks, scores)
            top = jnp.maximum(top, sink)
        exponentials = jnp.exp(scores - top)
        total = exponentials.sum(-1, keepdims=True)
        if learned.sinks is not None:
            total = total + jnp.exp(sink - top)
        out = jnp.einsum("bkgqs,bksd->bkgqd", exponentials.astype(v.dtype), v[:, :, block[1]])
        outs.append(out / total.astype(out.dtype))
        normalisers.append(top + jnp.log(total))
    mixed = checkpoint_name(heads_last(jnp.concatenate(outs, axis=3)), SAVED)
    normaliser = checkpoint_name(jnp.concatenate(normalisers, axis=3), SAVED)
    return mixed, (query, key, value, learned, mixed, normaliser, at, within)


def _blocked_backward(scoring: Scoring, residuals: Any, d_mixed: jax.Array) -> Any:
    """Every large product takes the [query, key] block as it lies: transposing one costs more than the product."""
    query, k, v, learned, mixed, normaliser, at, within = residuals
    q, out, d_out = (heads_first(x, k.shape[1]) for x in (query, mixed, d_mixed))
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_queries = []
    d_key, d_value = (jnp.zeros(x.shape, jnp.float32) for x in (k, v.swapaxes(2, 3)))
    table = jax.tree.map(lambda t: t.astype(jnp.float32), learned.table)
    d_table = jax.tree.map(jnp.zeros_like, table)
    for block in _blocks(scoring.mask, query.shape[1]):
        rows, columns = block
        change = functools.partial(scoring.changed, query_at=at[:, rows], key_at=at[:, columns])
        scores, back = jax.vjp(change, _products(q, k, block), table)
        scores = _masked(scoring.mask, scores, at, within, block)
        # A row that sees nothing (padding) has no probabilities to take gradients of.
        p = jnp.where(scores > MASKED, jnp.exp(scores - normaliser[:, :, :, rows]), 0)
        do = d_out[:, :, :, rows]
        dp = jnp.einsum("bkgqd,bksd->bkgqs", do, v[:, :, columns], preferred_element_type=jnp.float32)
        ds, d_rows = back(p * (dp - delta[:, :, :, rows]))
        ds = ds.astype(q.dtype)
        d_table = jax.tree.map(jnp.add, d_table, d_rows)
        d_queries.append(jnp.einsum("bkgqs,bkds->bkgqd", ds, k[..., columns]))
        d_value = d_value.at[..., columns].add(over_queries(do, p.astype(do.dtype)))
        d_key = d_key.at[..., columns].add(over_queries(q[:, :, :, rows], ds))
    d_query = heads_last(jnp.concatenate(d_queries, axis=3)).astype(query.dtype)
    d_learned = Learned(sinks_gradient(learned.sinks, normaliser, delta), d_table)
    d_learned = jax.tree.map(lambda d, x: d.astype(x.dtype), d_learned, learned)
    return d_query, d_key.astype(k.dtype), d_value.swapaxes(2, 3).astype(v.dtype), d_learned, None, None


_blocked.defvjp(cast(Any, _blocked_forward), cast(Any, _blocked_backward))
