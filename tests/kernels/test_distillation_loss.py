"""The loss of a student beside a teacher, against the formula on whole logits in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels.cross_entropy import Readout, vocabulary_loss
from lmx.kernels.distillation import Softening, distillation_loss

BATCH, LENGTH, VOCAB, PADDED, WIDTH = 2, 24, 37, 40, 8


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


STUDENT = Readout(draw(0, BATCH, LENGTH, WIDTH), draw(1, PADDED, WIDTH), draw(2, PADDED), VOCAB, softcap=3.0)
TEACHER = Readout(draw(3, BATCH, LENGTH, 2 * WIDTH), draw(4, PADDED, 2 * WIDTH), None, VOCAB)
TARGETS = jax.random.randint(jax.random.key(5), (BATCH, LENGTH), 0, VOCAB)
WEIGHTS = (jax.random.uniform(jax.random.key(6), (BATCH, LENGTH)) < 0.8).astype(jnp.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def plain(hidden: Any, table: Any, bias: Any, how: Softening) -> float:
    s = np.einsum("bld,vd->blv", *(np.asarray(a, np.float64) for a in (hidden, table))) + np.asarray(bias, np.float64)
    s = (3.0 * np.tanh(s / 3.0))[..., :VOCAB]
    t = np.einsum("bld,vd->blv", *(np.asarray(a, np.float64) for a in (TEACHER.hidden, TEACHER.table)))[..., :VOCAB]
    ours, total = log_softmax(s / how.temperature), 0.0
    for i, j in zip(*np.nonzero(np.asarray(WEIGHTS)), strict=True):
        kept = np.argsort(-t[i, j])[: how.top or VOCAB]
        theirs = log_softmax(t[i, j][kept] / how.temperature)
        soft = (np.exp(theirs) * (theirs - ours[i, j][kept])).sum()
        whole = log_softmax(s[i, j])
        smooth = np.full(VOCAB, how.label_smoothing / VOCAB)
        smooth[TARGETS[i, j]] += 1 - how.label_smoothing
        normaliser = np.log(np.exp(s[i, j]).sum())
        hard = -(smooth * whole).sum() + how.z_loss * normaliser**2
        total += (1 - how.share) * hard + how.share * how.temperature**2 * soft
    return total


CASES = [
    Softening(share=0.3, temperature=2.0, z_loss=1e-2, label_smoothing=0.1),
    Softening(share=1.0, temperature=0.7, top=5),
]


def loss(hidden: Any, table: Any, bias: Any, how: Softening) -> jax.Array:
    student = Readout(hidden, table, bias, VOCAB, STUDENT.softcap)
    return distillation_loss(student, TEACHER, TARGETS, WEIGHTS, how).total


@pytest.mark.parametrize("how", CASES, ids=["all tokens", "the likeliest"])
def test_the_loss_and_its_gradient_are_the_formulas(how: Softening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmx.kernels.cross_entropy.CHUNK_ROWS", 12)  # several chunks
    own = STUDENT.hidden, STUDENT.table, STUDENT.bias
    np.testing.assert_allclose(loss(*own, how), plain(*own, how), rtol=1e-5)
    gradients = jax.grad(loss, argnums=(0, 1, 2))(*own, how)
    for index, gradient in enumerate(gradients):
        direction = np.asarray(draw(7 + index, *own[index].shape), np.float64)
        ahead, back = (
            plain(
                *[np.asarray(a, np.float64) + (step * direction if i == index else 0) for i, a in enumerate(own)], how
            )
            for step in (1e-5, -1e-5)
        )
        np.testing.assert_allclose((gradient * direction).sum(), (ahead - back) / 2e-5, rtol=1e-3, atol=1e-3)


def test_without_a_teacher_it_is_the_cross_entropy() -> None:
    sums = distillation_loss(STUDENT, TEACHER, TARGETS, WEIGHTS, Softening(share=0.0))
    alone = vocabulary_loss(STUDENT, TARGETS, WEIGHTS)
    for name in ("total", "nll", "weight", "correct"):
        np.testing.assert_allclose(getattr(sums, name), getattr(alone, name), rtol=1e-5)


def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_it() -> None:
    def total(hidden: jax.Array) -> jax.Array:
        own = Readout(hidden, TEACHER.table, None, VOCAB)
        return distillation_loss(own, TEACHER, TARGETS, WEIGHTS, Softening(share=1.0, temperature=2.0)).total

    value, gradient = jax.value_and_grad(total)(TEACHER.hidden)
    np.testing.assert_allclose(value, 0, atol=1e-3)
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
