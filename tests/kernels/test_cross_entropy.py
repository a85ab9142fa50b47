import functools
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels import cross_entropy
from lmx.kernels.cross_entropy import Readout, vocabulary_loss

BATCH, LENGTH, WIDTH, VOCAB, PADDED = 2, 4, 5, 7, 9


@dataclass(frozen=True)
class LossShape:
    """A loss, for :func:`loss_of` and :func:`reference`."""

    vocab: int
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    softcap: float | None = None
    biased: bool = False

    def bias(self, rows):
        return jnp.linspace(-1, 1, rows) if self.biased else None


SHAPES = {
    "plain": LossShape(VOCAB),
    "z_loss": LossShape(VOCAB, z_loss=0.1),
    "smoothing": LossShape(VOCAB, label_smoothing=0.2),
    "both": LossShape(VOCAB, z_loss=0.05, label_smoothing=0.1),
    "softcap": LossShape(VOCAB, softcap=2.0),
    "all": LossShape(VOCAB, 0.05, 0.1, softcap=1.5, biased=True),
}


def loss_of(hidden, table, targets, weights, shape, bias=None):
    """What is tested, in the form of its reference."""
    bias = shape.bias(table.shape[0]) if bias is None else bias
    return _loss_of(hidden, table, targets, weights, shape, bias)


@functools.partial(jax.jit, static_argnums=4)
def _loss_of(hidden, table, targets, weights, shape, bias):
    readout = Readout(hidden, table, bias, shape.vocab, shape.softcap)
    return vocabulary_loss(readout, targets, weights, z_loss=shape.z_loss, label_smoothing=shape.label_smoothing)


def drawn(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH)).astype(dtype)
    table = jax.random.normal(keys[1], (PADDED, WIDTH)).astype(dtype)
    targets = jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCAB)
    weights = jnp.array([[1, 1, 0, 2], [0.5, 1, 1, 0]], jnp.float32)
    return hidden, table, targets, weights


def reference(hidden, table, targets, weights, shape, bias=None):
    """(total, nll, weight, correct) in float64, from the definitions."""
    scores = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64)[: shape.vocab].T
    bias = shape.bias(len(table)) if bias is None else bias
    scores = scores if bias is None else scores + np.asarray(bias, np.float64)[: shape.vocab]
    scores = scores if shape.softcap is None else shape.softcap * np.tanh(scores / shape.softcap)
    lse = np.log(np.exp(scores).sum(-1, keepdims=True))
    logp = scores - lse
    wanted = np.eye(shape.vocab)[np.asarray(targets)]
    smooth = (1 - shape.label_smoothing) * wanted + shape.label_smoothing / shape.vocab
    losses = -(smooth * logp).sum(-1) + shape.z_loss * lse[..., 0] ** 2
    hits = scores.argmax(-1) == targets
    w = np.asarray(weights, np.float64)
    return [float((w * x).sum()) for x in (losses, -(wanted * logp).sum(-1), np.ones_like(w), hits)]


def slopes(function, x, step=1e-5):
    """The gradient by central differences in float64."""
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.fixture(params=[512, 4, 1], ids=["one chunk", "two chunks", "a row each"])
def chunk_rows(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", request.param)


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sums_equal_float64_reference(shape):
    arrays = drawn()
    got = jax.jit(lambda *a: loss_of(*a, shape))(*arrays)
    np.testing.assert_allclose([got.total, got.nll, got.weight, got.correct], reference(*arrays, shape), rtol=1e-6)


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_equal_central_differences(shape):
    hidden, table, targets, weights = drawn()
    got = jax.grad(lambda h, t: 3 * loss_of(h, t, targets, weights, shape).total, (0, 1))(hidden, table)
    by_hidden = slopes(lambda h: 3 * reference(h, table, targets, weights, shape)[0], hidden)
    by_table = slopes(lambda t: 3 * reference(hidden, t, targets, weights, shape)[0], table)
    np.testing.assert_allclose(got[0], by_hidden, atol=2e-5)
    np.testing.assert_allclose(got[1], by_table, atol=2e-5)
    assert not np.any(np.asarray(got[1])[VOCAB:])  # the padding rows
    assert not np.any(np.asarray(got[0])[np.asarray(weights) == 0])


def test_the_gradient_of_the_bias_equals_central_differences():
    hidden, table, targets, weights = drawn()
    shape, bias = SHAPES["all"], SHAPES["all"].bias(PADDED)
    got = jax.grad(lambda b: loss_of(hidden, table, targets, weights, shape, b).total)(bias)
    np.testing.assert_allclose(
        got, slopes(lambda b: reference(hidden, table, targets, weights, shape, b)[0], bias), atol=2e-5
    )


def test_nothing_to_predict_gives_zero():
    hidden, table, targets, weights = drawn()
    loss = lambda h, t: loss_of(h, t, targets, weights * 0, SHAPES["both"]).total  # noqa: E731
    total, gradients = jax.value_and_grad(loss, (0, 1))(hidden, table)
    assert float(total) == 0
    assert all(not np.any(g) for g in gradients)


def test_bfloat16_is_near_and_keeps_its_dtype():
    hidden, table, targets, weights = drawn(jnp.bfloat16)
    loss = lambda h, t: loss_of(h, t, targets, weights, SHAPES["both"]).total  # noqa: E731
    total, gradients = jax.value_and_grad(loss, (0, 1))(hidden, table)
    assert total.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    wide = [jnp.asarray(a, jnp.float32) for a in (hidden, table)]
    expected, exact = jax.value_and_grad(loss, (0, 1))(*wide)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for low, high in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(np.asarray(low, np.float32), high, atol=0.03)


def test_large_logits_do_not_overflow():
    hidden, table, targets, weights = drawn()
    loss = lambda h: loss_of(h, table, targets, weights, SHAPES["plain"]).total  # noqa: E731
    total, gradient = jax.value_and_grad(loss)(hidden * 1e4)
    assert np.isfinite(total)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["nll", "weight", "correct"])
def test_only_the_total_carries_a_gradient(name):
    hidden, table, targets, weights = drawn()
    of_part = lambda h: getattr(loss_of(h, table, targets, weights, SHAPES["plain"]), name)  # noqa: E731
    assert not np.any(jax.grad(of_part)(hidden))


def test_the_logits_of_a_big_batch_never_exist_at_once():
    batch, length, width, vocab = 8, 512, 16, 8192
    hidden = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
    table = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32)
    loss = lambda h, t, y, w: loss_of(h, t, y, w, LossShape(vocab)).total  # noqa: E731
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, table, targets, weights).compile()
    logits = batch * length * vocab
    arrays = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    assert max(np.prod([int(n) for n in dims.split(",")]) for dims in arrays) <= logits / 8
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * logits / 2
