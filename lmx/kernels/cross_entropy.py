"""Cross-entropy over the vocabulary, in chunks: the logits of the whole batch never exist at once.

The forward pass already forms the gradients, chunk by chunk, while a chunk's logits are at hand; the backward pass
only scales them. So each chunk's logits are computed once, and no [batch, length, vocab] array is kept.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp

from lmx.kernels.scoring import MASKED
from lmx.sharding.rules import LogicalAxes, constrain, ways

CHUNK_ROWS = 512
"""Rows (tokens) of logits that a device holds at once."""
ROWS = ("act_batch", "act_length", "act_vocab")
TABLE = ("vocab", "embed")


SUMS = ["total", "nll", "weight", "correct", "aux"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=SUMS, meta_fields=[])
@dataclass(frozen=True)
class LossSums:
    """Float32 scalars, sums over the targets by weight: what is minimised, its cross-entropy part (nats), the
    weights, and the targets that are the arg-max. Only ``total`` carries a gradient. ``aux`` is what the model's
    sublayers told, times the weight."""

    total: jax.Array
    nll: jax.Array
    weight: jax.Array
    correct: jax.Array
    aux: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Readout:
    """What predicts tokens: the logits are ``capped(hidden @ table.T + bias)``.

    Attributes:
      hidden: [batch, length, embed], float32 or bfloat16.
      table: [padded vocab, embed].
      bias: [padded vocab], or None.
      vocab: tokens without the padding.
      softcap: logits l become ``softcap * tanh(l / softcap)`` (Gemma 2), or None.
    """

    hidden: jax.Array
    table: jax.Array
    bias: jax.Array | None
    vocab: int
    softcap: float | None = None


def readout_logits(readout: Readout, axes: LogicalAxes) -> jax.Array:
    """Float32 logits [batch, length, padded vocab], laid out by ``axes``; those of the padding are masked."""
    shape = _Shape(readout.vocab, readout.softcap)
    scores = constrain(_scores(shape, readout.table, readout.bias, readout.hidden), axes)
    return jnp.where(jnp.arange(readout.table.shape[0]) < readout.vocab, scores, MASKED)


@dataclass(frozen=True)
class _Shape:
    """What a compiled loss depends on beside the arrays."""

    vocab: int
    softcap: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0


def vocabulary_loss(
    readout: Readout, targets: jax.Array, weights: jax.Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> LossSums:
    """The weighted sums of the token losses ``logsumexp(l) - l[target]`` of the readout's logits ``l``.

    Args:
      readout: what predicts.
      targets: int32 [batch, length].
      weights: float32 [batch, length]; 0 where there is nothing to predict.
      z_loss: weight of the squared log-normaliser (Chowdhery et al. 2022).
      label_smoothing: share of each target's probability that is spread over the vocabulary.
    """
    shape = _Shape(readout.vocab, readout.softcap, z_loss, label_smoothing)
    total, nll, weight, correct = _loss(shape, readout.hidden, readout.table, readout.bias, targets, weights)
    return LossSums(total, nll, weight, correct)


def chunks_of(array: jax.Array, count: int) -> jax.Array:
    """[batch, length, ...] -> [count, batch, length / count, ...], so that batch and length stay sharded: each chunk
    takes a part of every shard of the length."""
    batch, length, *rest = array.shape
    shards = ways("act_length")
    parts = array.reshape(batch, shards, count, length // count // shards, *rest)
    return jnp.moveaxis(parts, 2, 0).reshape(count, batch, length // count, *rest)


def unchunked(chunks: jax.Array) -> jax.Array:
    """The inverse of :func:`chunks_of`."""
    count, batch, size, *rest = chunks.shape
    shards = ways("act_length")
    parts = chunks.reshape(count, batch, shards, size // shards, *rest)
    return jnp.moveaxis(parts, 0, 2).reshape(batch, count * size, *rest)


def chunk_count(batch: int, length: int) -> int:
    """The fewest equal chunks of a shard's length that hold at most CHUNK_ROWS rows a device."""
    length = length // ways("act_length")
    rows = batch * length // ways("act_batch")
    return next(c for c in range(1, length + 1) if length % c == 0 and (rows // c <= CHUNK_ROWS or c == length))


def _scores(shape: _Shape, table: jax.Array, bias: jax.Array | None, hidden: jax.Array) -> jax.Array:
    scores = jnp.einsum("bld,vd->blv", hidden, table, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    return scores if shape.softcap is None else shape.softcap * jnp.tanh(scores / shape.softcap)


def _chunk_loss(shape: _Shape, table: jax.Array, bias: Any, hidden: jax.Array, targets: Any, weights: Any) -> Any:
    """One chunk's sums, and what the gradient needs: shifted exponentials, their sums, the log-sum-exp, targets hit,
    and the slope of the cap."""
    scores = constrain(_scores(shape, table, bias, hidden), ROWS)
    slope = None if shape.softcap is None else 1 - jnp.square(scores / shape.softcap)
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
    return sums, (exponentials, normaliser, lse, hit, column, slope)


def _chunk_gradient(shape: _Shape, parts: Any, weights: jax.Array) -> jax.Array:
    """d(sum of the chunk's losses) / d(logits before their cap), float32 [batch, chunk, vocab]."""
    exponentials, normaliser, lse, hit, column, slope = parts
    factor = weights[..., None] / normaliser
    if shape.z_loss:
        factor = factor * (1 + 2 * shape.z_loss * lse)[..., None]
    target = jnp.where(hit, (1 - shape.label_smoothing) * weights[..., None], 0)
    if shape.label_smoothing:
        smooth = weights[..., None] * (shape.label_smoothing / shape.vocab)
        target = target + jnp.where(column < shape.vocab, smooth, 0)
    gradient = exponentials * factor - target
    return gradient if slope is None else gradient * slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(shape: _Shape, hidden: Any, table: Any, bias: Any, targets: Any, weights: Any) -> Any:
    def body(sums: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        return sums + _chunk_loss(shape, table, bias, *chunk)[0], None

    count = chunk_count(*targets.shape)
    chunks = tuple(chunks_of(a, count) for a in (hidden, targets, weights))
    return tuple(jax.lax.scan(body, jnp.zeros(4, jnp.float32), chunks)[0])


def _forward(shape: _Shape, hidden: Any, table: Any, bias: Any, targets: Any, weights: Any) -> Any:
    # Gathered once, not for each chunk, and after its cast to a narrower dtype, not before.
    table = constrain(constrain(table, TABLE), ("act_vocab", None))

    def body(carry: Any, chunk: Any) -> Any:
        sums, d_table, d_bias = carry
        new, parts = _chunk_loss(shape, table, bias, *chunk)
        exact = constrain(_chunk_gradient(shape, parts, chunk[2]), ROWS)
        d_scores = exact.astype(hidden.dtype)
        d_hidden = jnp.einsum("blv,vd->bld", d_scores, table)
        by_shard = (_sharded(d_scores), _sharded(chunk[0]))
        d_table += jnp.einsum("pbqlv,pbqld->pqvd", *by_shard, preferred_element_type=jnp.float32)
        d_bias = None if bias is None else d_bias + _sharded(exact).sum((1, 3))
        return (sums + new, d_table, d_bias), d_hidden

    count = chunk_count(*targets.shape)
    chunks = tuple(chunks_of(a, count) for a in (hidden, targets, weights))
    zeros = jax.tree.map(functools.partial(_zeros_by_shard, _shards(*targets.shape)), (table, bias))
    (sums, *d_weights), d_hidden = jax.lax.scan(body, (jnp.zeros(4, jnp.float32), *zeros), chunks)
    d_hidden = unchunked(d_hidden)
    d_table, d_bias = jax.tree.map(lambda d, a: d.astype(a.dtype).sum((0, 1)), tuple(d_weights), (table, bias))
    return tuple(sums), (d_hidden.astype(hidden.dtype), d_table, d_bias)


def _sharded(x: jax.Array) -> jax.Array:
    """[batch, length, any] -> [batch shards, batch / shards, length shards, length / shards, any].

    What is summed over the second and fourth of these axes stays on its device: were the gradient of the table summed
    over batch and length, the compiler would sum it over all devices in every chunk.
    """
    batch, length, last = x.shape
    rows, columns = _shards(batch, length)
    return x.reshape(rows, batch // rows, columns, length // columns, last)


def _shards(batch: int, length: int) -> tuple[int, int]:
    rows, columns = ways("act_batch"), ways("act_length")
    return (1 if batch % rows else rows), (1 if length % columns else columns)


def _zeros_by_shard(shards: tuple[int, int], parameter: jax.Array) -> jax.Array:
    """Where each shard of the tokens sums its own part of the gradient of a parameter [padded vocab, ...]."""
    zeros = jnp.zeros((*shards, *parameter.shape), jnp.float32)
    return constrain(zeros, ("act_batch", "act_length", "act_vocab", None)[: zeros.ndim])


def _backward(shape: _Shape, residuals: Any, cotangents: Any) -> Any:
    scaled = jax.tree.map(lambda d: (d * cotangents[0]).astype(d.dtype), residuals)
    return (*scaled, None, None)


_loss.defvjp(cast(Any, _forward), cast(Any, _backward))
