"""Attention: one entry point. Structure (mask type, segments) goes in, never a [length, length] array of the batch.

Two implementations stand behind it. ``dense`` takes any query against any keys (a cache) and knows dropout. ``blocked``
is for a sequence that attends to itself: it goes through blocks of queries, each against the keys that its mask can
reach, and its backward pass computes the probabilities again from the saved log-sum-exps (Dao et al. 2022), so that
memory grows with block x length and a causal mask costs little more than half of the full square.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmx.kernels.masks import Mask
from lmx.kernels.relative import Bias

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row with nothing to see gives no NaN
SAVED = "attention"
"""Name of what the backward pass needs beside the inputs, for rematerialisation policies."""
BLOCKS = 4
"""Blocks that a sequence is cut into: 4 leave 5/8 of a causal square, more save little and compile longer."""
BLOCK_MINIMUM = 128
BLOCK_MAXIMUM = 1024


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
    if itself and (dropout_key is None or dropout == 0):
        return _blocked(scoring, query, key, value, learned, query_positions, query_segments)
    grouped = _heads_first(query, math.prod(key.shape[:-2]) // query.shape[0])
    rows = grouped.reshape(*key.shape[:-2], -1, query.shape[-1])
    scores = jnp.matmul(rows, key, preferred_element_type=jnp.float32).reshape(*grouped.shape[:-1], -1)
    scores = scoring.changed(scores, bias_table, query_positions, key_positions)
    seen = _seen(mask, query_positions, key_positions, query_segments, key_segments)
    probabilities = _softmax(jnp.where(seen[:, None, None], scores, MASKED), sinks)
    if dropout_key is not None and dropout > 0:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout, probabilities.shape)
        probabilities = jnp.where(kept, probabilities / (1 - dropout), 0)
    mixed = jnp.matmul(probabilities.astype(value.dtype).reshape(*rows.shape[:-1], -1), value)
    return _heads_last(mixed.reshape(*grouped.shape[:-1], -1))


def _seen(mask: Mask, query_at: jax.Array, key_at: jax.Array, query_in: jax.Array, key_in: jax.Array) -> jax.Array:
    """bool [batch, query, key] from positions and segments of both."""
    same = (query_in[:, :, None] == key_in[:, None, :]) & (key_in > 0)[:, None, :]
    return mask.allowed(query_at[:, :, None], key_at[:, None, :]) & same


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Probabilities of the keys [batch, kv_heads, group, query, key]; the sinks keep what is left."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = _by_head(sinks, scores)
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sink))
    exponentials = jnp.exp(scores - top)
    return exponentials / (exponentials.sum(-1, keepdims=True) + jnp.exp(sink - top))


def _by_head(x: jax.Array, scores: jax.Array) -> jax.Array:
    """[heads] -> float32 [kv_heads, group, 1, 1], as the heads of scores [batch, kv_heads, group, query, key] lie."""
    return x.astype(jnp.float32).reshape(*scores.shape[1:3], 1, 1)


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


def _products(query: jax.Array, key: jax.Array, block: Any) -> jax.Array:
    """Float32 scores of one block [batch, kv_heads, group, query, key], as the product gives them."""
    rows, columns = block
    return jnp.einsum("bkgqd,bkds->bkgqs", query[:, :, :, rows], key[..., columns], preferred_element_type=jnp.float32)


def _masked(mask: Mask, scores: jax.Array, at: Any, within: Any, block: Any) -> jax.Array:
    rows, columns = block
    seen = _seen(mask, at[:, rows], at[:, columns], within[:, rows], within[:, columns])
    return jnp.where(seen[:, None, None], scores, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(
    scoring: Scoring, query: jax.Array, key: jax.Array, value: jax.Array, learned: Learned, at: Any, within: Any
) -> Any:
    return _blocked_forward(scoring, query, key, value, learned, at, within)[0]


def _blocked_forward(scoring: Scoring, query: Any, key: Any, value: Any, learned: Learned, at: Any, within: Any) -> Any:
    q, k, v = _heads_first(query, key.shape[1]), key, value
    outs, normalisers = [], []
    for block in _blocks(scoring.mask, query.shape[1]):
        scores = scoring.changed(_products(q, k, block), learned.table, at[:, block[0]], at[:, block[1]])
        scores = _masked(scoring.mask, scores, at, within, block)
        top = scores.max(-1, keepdims=True)
        if learned.sinks is not None:
            sink = _by_head(learned.sinks, scores)
            top = jnp.maximum(top, sink)
        exponentials = jnp.exp(scores - top)
        total = exponentials.sum(-1, keepdims=True)
        if learned.sinks is not None:
            total = total + jnp.exp(sink - top)
        out = jnp.einsum("bkgqs,bksd->bkgqd", exponentials.astype(v.dtype), v[:, :, block[1]])
        outs.append(out / total.astype(out.dtype))
        normalisers.append(top + jnp.log(total))
    mixed = checkpoint_name(_heads_last(jnp.concatenate(outs, axis=3)), SAVED)
    normaliser = checkpoint_name(jnp.concatenate(normalisers, axis=3), SAVED)
    return mixed, (query, key, value, learned, mixed, normaliser, at, within)


def _blocked_backward(scoring: Scoring, residuals: Any, d_mixed: jax.Array) -> Any:
    """Every large product takes the [query, key] block as it lies: transposing one costs more than the product."""
    query, k, v, learned, mixed, normaliser, at, within = residuals
    q, out, d_out = (_heads_first(x, k.shape[1]) for x in (query, mixed, d_mixed))
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
        d_value = d_value.at[..., columns].add(_over_queries(do, p.astype(do.dtype)))
        d_key = d_key.at[..., columns].add(_over_queries(q[:, :, :, rows], ds))
    d_query = _heads_last(jnp.concatenate(d_queries, axis=3)).astype(query.dtype)
    d_learned = Learned(_sinks_gradient(learned.sinks, normaliser, delta), d_table)
    d_learned = jax.tree.map(lambda d, x: d.astype(x.dtype), d_learned, learned)
    return d_query, d_key.astype(k.dtype), d_value.swapaxes(2, 3).astype(v.dtype), d_learned, None, None


def _sinks_gradient(sinks: jax.Array | None, normaliser: jax.Array, delta: jax.Array) -> jax.Array | None:
    """Float32 [heads]: a sink takes its probability from the keys and gives no value back."""
    if sinks is None:
        return None
    probability = jnp.exp(_by_head(sinks, normaliser) - normaliser)
    return -(probability * delta).sum((0, 3, 4)).reshape(-1)


def _over_queries(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[batch, kv_heads, group, query, d], [batch, kv_heads, group, query, key] -> float32 [batch, kv_heads, d, key]."""
    dims = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    product = jax.lax.dot_general(x, weights, dims, preferred_element_type=jnp.float32)
    # XLA:CPU has no bfloat16 product into float32 with the transposition that follows folded in.
    return jax.lax.optimization_barrier(product)


_blocked.defvjp(cast(Any, _blocked_forward), cast(Any, _blocked_backward))
