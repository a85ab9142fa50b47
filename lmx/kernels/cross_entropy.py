"""Cross-entropy over the vocabulary, in chunks: the logits of the whole batch never exist at once.

The forward pass already forms the gradients, chunk by chunk, while a chunk's logits are at hand; the backward pass
only scales them. So each chunk's logits are computed once, and no [batch, length, vocab] array is kept.
"""

import functools
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from lmx.kernels.attention import MASKED
from lmx.sharding.rules import constrain, ways

CHUNK_ROWS = 512
"""Rows (tokens) of logits that a device holds at once."""
ROWS = ("act_batch", None, "act_vocab")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["total", "nll", "weight", "correct"], meta_fields=[])
@dataclass(frozen=True)
class LossSums:
    """Float32 scalars, sums over the targets by weight: what is minimised, its cross-entropy part (nats), the
    weights, and the targets that are the arg-max. Only ``total`` carries a gradient."""

    total: jax.Array
    nll: jax.Array
    weight: jax.Array
    correct: jax.Array


@dataclass(frozen=True)
class LossShape:
    """What shapes the loss: the vocabulary without padding, z-loss (Chowdhery et al. 2022), label smoothing."""

    vocab: int
    z_loss: float = 0.0
    label_smoothing: float = 0.0


def vocabulary_loss(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, shape: LossShape
) -> LossSums:
    """The weighted sums of the token losses ``logsumexp(l) - l[target]`` with ``l = hidden @ table.T``.

    Args:
      hidden: [batch, length, embed], float32 or bfloat16.
      table: [padded vocab, embed].
      targets: int32 [batch, length].
      weights: float32 [batch, length]; 0 where there is nothing to predict.
      shape: the loss's own numbers.
    """
    total, nll, weight, correct = _loss(shape, hidden, table, targets, weights)
    return LossSums(total, nll, weight, correct)


def _chunks(array: jax.Array, count: int) -> jax.Array:
    """[batch, length, ...] -> [count, batch, length / count, ...], so that the batch stays sharded."""
    batch, length, *rest = array.shape
    return jnp.moveaxis(array.reshape(batch, count, length // count, *rest), 1, 0)


def _chunk_count(batch: int, length: int) -> int:
    """The fewest equal chunks of the length that hold at most CHUNK_ROWS rows a device."""
    rows = batch * length // ways("act_batch")
    return next(c for c in range(1, length + 1) if length % c == 0 and (rows // c <= CHUNK_ROWS or c == length))


def _chunk_loss(shape: LossShape, table: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    """One chunk's sums, and what the gradient needs: shifted exponentials, their sums, the log-sum-exp, targets hit."""
    scores = jnp.einsum("bld,vd->blv", hidden, table, preferred_element_type=jnp.float32)
    scores = constrain(scores, ROWS)
    column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    if table.shape[0] > shape.vocab:
        scores = jnp.where(column < shape.vocab, scores, MASKED)
    hit = column == targets[..., None]
    top = scores.max(-1, keepdims=True)
    exponentials = jnp.exp(scores - top)
    normaliser = exponentials.sum(-1, keepdims=True)
    lse = (jnp.log(normaliser) + top)[..., 0]
    at_target = jnp.where(hit, scores, 0).sum(-1)
    nll = lse - at_target
    loss = nll
    if shape.label_smoothing:
        mean = jnp.where(column < shape.vocab, scores, 0).sum(-1) / shape.vocab
        loss = nll + shape.label_smoothing * (at_target - mean)
    if shape.z_loss:
        loss = loss + shape.z_loss * jnp.square(lse)
    correct = at_target >= top[..., 0]
    sums = jnp.stack([(weights * x).sum() for x in (loss, nll, jnp.ones_like(nll), correct)])
    return sums, (exponentials, normaliser, lse, hit, column)


def _chunk_gradient(shape: LossShape, parts: Any, weights: jax.Array) -> jax.Array:
    """d(sum of the chunk's losses) / d(logits), float32 [batch, chunk, vocab]."""
    exponentials, normaliser, lse, hit, column = parts
    factor = weights[..., None] / normaliser
    if shape.z_loss:
        factor = factor * (1 + 2 * shape.z_loss * lse)[..., None]
    target = jnp.where(hit, (1 - shape.label_smoothing) * weights[..., None], 0)
    if shape.label_smoothing:
        smooth = weights[..., None] * (shape.label_smoothing / shape.vocab)
        target = target + jnp.where(column < shape.vocab, smooth, 0)
    return exponentials * factor - target


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(shape: LossShape, hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    def body(sums: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        return sums + _chunk_loss(shape, table, *chunk)[0], None

    count = _chunk_count(*targets.shape)
    chunks = tuple(_chunks(a, count) for a in (hidden, targets, weights))
    return tuple(jax.lax.scan(body, jnp.zeros(4, jnp.float32), chunks)[0])


def _forward(shape: LossShape, hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    def body(carry: Any, chunk: Any) -> Any:
        sums, d_table = carry
        new, parts = _chunk_loss(shape, table, *chunk)
        d_scores = constrain(_chunk_gradient(shape, parts, chunk[2]), ROWS).astype(hidden.dtype)
        d_hidden = jnp.einsum("blv,vd->bld", d_scores, table)
        d_table += jnp.einsum("blv,bld->vd", d_scores, chunk[0], preferred_element_type=jnp.float32)
        return (sums + new, d_table), d_hidden

    count = _chunk_count(*targets.shape)
    chunks = tuple(_chunks(a, count) for a in (hidden, targets, weights))
    start = (jnp.zeros(4, jnp.float32), jnp.zeros(table.shape, jnp.float32))
    (sums, d_table), d_hidden = jax.lax.scan(body, start, chunks)
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
    return tuple(sums), (d_hidden.astype(hidden.dtype), d_table.astype(table.dtype))


def _backward(shape: LossShape, residuals: Any, cotangents: Any) -> Any:
    d_hidden, d_table = residuals
    scale = cotangents[0]
    return (d_hidden * scale).astype(d_hidden.dtype), (d_table * scale).astype(d_table.dtype), None, None


_loss.defvjp(cast(Any, _forward), cast(Any, _backward))
