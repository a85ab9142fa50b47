"""Losses of a student's predictions beside a teacher's, in chunks: neither model's logits ever exist for a whole batch.

As in :mod:`lmx.kernels.cross_entropy`, the forward pass forms the gradients while a chunk's logits are at hand, and the
backward pass only scales them.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp

from lmx.kernels.cross_entropy import ROWS, LossSums, Readout, chunk_count, chunks_of, readout_logits, unchunked


@dataclass(frozen=True)
class Softening:
    """How much a teacher's predictions count, and how they are softened.

    Attributes:
      share: of the loss that is the teacher's; the rest is cross-entropy with the targets.
      temperature: logits of both models are divided by it; the teacher's part is multiplied by its square, so that its
        gradient keeps its size (Hinton et al. 2015, 2).
      top: only so many of the teacher's likeliest tokens count, their probabilities made to sum to 1; 0 for all.
      z_loss, label_smoothing: of the cross-entropy, as in :func:`lmx.kernels.cross_entropy.vocabulary_loss`.
    """

    share: float = 0.5
    temperature: float = 1.0
    top: int = 0
    z_loss: float = 0.0
    label_smoothing: float = 0.0


Weights = tuple[jax.Array, jax.Array | None]
"""A readout's table and bias."""


def distillation_loss(
    student: Readout, teacher: Readout, targets: jax.Array, weights: jax.Array, how: Softening
) -> LossSums:
    """The weighted sums of ``(1 - share) * CE(target, s) + share * T^2 * KL(softmax(t / T) || softmax(s / T))``.

    ``aux["metrics"]["teacher_kl"]`` is the sum of that divergence, in nats at the temperature.

    Args:
      student: what predicts, and is trained.
      teacher: what it is to predict like: as many tokens; it gets no gradient.
      targets: int32 [batch, length].
      weights: float32 [batch, length]; 0 where there is nothing to predict.
      how: the two parts' shares.
    """
    shape = tuple(replace(r, hidden=None, table=None, bias=None) for r in (student, teacher))  # type: ignore[arg-type]
    rows = (student.hidden, teacher.hidden, targets, weights)
    sums = _loss((*shape, how), (student.table, student.bias), (teacher.table, teacher.bias), rows)
    total, nll, weight, correct, divergence = sums
    return LossSums(total, nll, weight, correct, {"metrics": {"teacher_kl": divergence}})


def _chunk_sums(shape: Any, rows: Any, other: Weights, hidden: jax.Array, own: Weights) -> tuple[jax.Array, Any]:
    """What is minimised over a chunk, and the other sums."""
    (student, teacher, how), (teachers, targets, weights) = shape, rows
    scores = readout_logits(replace(student, hidden=hidden, table=own[0], bias=own[1]), ROWS)
    theirs = readout_logits(replace(teacher, hidden=teachers, table=other[0], bias=other[1]), ROWS)
    lse = jax.nn.logsumexp(scores, axis=-1)
    target = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    nll, mean = lse - target, scores[..., : student.vocab].mean(-1)
    hard = nll + how.label_smoothing * (target - mean) + how.z_loss * jnp.square(lse)
    apart = divergence(scores / how.temperature, theirs / how.temperature, how.top)
    loss = (1 - how.share) * hard + how.share * how.temperature**2 * apart
    correct = (scores.argmax(-1) == targets).astype(jnp.float32)
    total, *rest = ((weights * x).sum() for x in (loss, nll, jnp.ones_like(nll), correct, apart))
    return total, tuple(rest)


def divergence(student: jax.Array, teacher: jax.Array, top: int = 0) -> jax.Array:
    """``KL(teacher || student)`` of logits [..., vocab], over the teacher's ``top`` likeliest tokens if that is set."""
    ours = jax.nn.log_softmax(student)
    if top:
        teacher, index = jax.lax.top_k(teacher, top)
        ours = jnp.take_along_axis(ours, index, axis=-1)
    theirs = jax.nn.log_softmax(teacher)
    return (jnp.exp(theirs) * (theirs - ours)).sum(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(shape: Any, own: Weights, other: Weights, rows: Any) -> Any:
    def body(sums: Any, chunk: Any) -> Any:
        hidden, *given = chunk
        total, rest = _chunk_sums(shape, given, other, hidden, own)
        return jax.tree.map(jnp.add, sums, (total, *rest)), None

    return jax.lax.scan(body, (jnp.float32(0),) * 5, _chunks(rows))[0]


def _forward(shape: Any, own: Weights, other: Weights, rows: Any) -> Any:
    def body(carry: Any, chunk: Any) -> Any:
        (sums, d_own), (hidden, *given) = carry, chunk
        of_student = functools.partial(_chunk_sums, shape, given, other)
        total, back, rest = jax.vjp(of_student, hidden, own, has_aux=True)
        d_hidden, new = back(jnp.float32(1))
        d_own = jax.tree.map(lambda d, n: d + n.astype(jnp.float32), d_own, new)
        return (jax.tree.map(jnp.add, sums, (total, *rest)), d_own), d_hidden

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), own)
    (sums, d_own), d_hidden = jax.lax.scan(body, ((jnp.float32(0),) * 5, zeros), _chunks(rows))
    return sums, (unchunked(d_hidden), jax.tree.map(lambda d, a: d.astype(a.dtype), d_own, own))


def _chunks(rows: Any) -> Any:
    count = chunk_count(*rows[-1].shape)
    return tuple(chunks_of(a, count) for a in rows)


def _backward(shape: Any, residuals: Any, cotangents: Any) -> Any:
    d_hidden, d_own = jax.tree.map(lambda d: (d * cotangents[0]).astype(d.dtype), residuals)
    return d_own, None, (d_hidden, None, None, None)


_loss.defvjp(cast(Any, _forward), cast(Any, _backward))
