"""Adapters and quantized kernels against formulas in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.adapters.adapter import Dora, Lora
from lmx.adapters.kernels import Added, Merged, with_dropout
from lmx.adapters.quantized import NF4, Int8, Nf4
from lmx.models.model import cast_floats
from lmx.nn.kernel import densed, opened
from lmx.optim.matrices import Matrix

QUERY, OUT = Matrix(1, 1, 2), Matrix(1, 2, 1)
SHAPES = {QUERY: (2, 16, 4, 8), OUT: (2, 4, 8, 16)}
RNG = np.random.default_rng(0)


def node(matrix: Matrix, kind: type = Added, dora: bool = False, dropout: float = 0.0):
    shape = SHAPES.get(matrix, (2, 3, 16, 8))
    lead, inputs, outputs = (
        shape[: matrix.lead],
        shape[matrix.lead : matrix.lead + matrix.inputs],
        shape[matrix.lead + matrix.inputs :],
    )
    draw = lambda *size: RNG.normal(size=size).astype(np.float32)  # noqa: E731
    magnitude = draw(*lead, *outputs) if dora else None
    return kind(
        draw(*shape), draw(*lead, *inputs, 3), draw(*lead, 3, *outputs), magnitude, None, matrix.inputs, 0.7, dropout
    )


def merged64(kernel, matrix: Matrix) -> np.ndarray:
    """W + scale a b, its columns brought to the lengths of ``magnitude``, layer by layer."""
    base = np.asarray(kernel.base, np.float64)
    lead = base.shape[: matrix.lead]
    flat = int(np.prod(base.shape[matrix.lead : matrix.lead + matrix.inputs]))
    w = base.reshape(*lead, flat, -1)
    a = np.asarray(kernel.a, np.float64).reshape(*lead, flat, -1)
    b = np.asarray(kernel.b, np.float64).reshape(*lead, a.shape[-1], -1)
    w = w + kernel.scale * np.einsum("...ir,...ro->...io", a, b)
    if kernel.magnitude is not None:
        lengths = np.asarray(kernel.magnitude, np.float64).reshape(*lead, 1, -1)
        w = lengths * w / np.linalg.norm(w, axis=-2, keepdims=True)
    return w.reshape(base.shape)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("matrix", [QUERY, OUT], ids=["query", "out"])
def test_products_and_merged_kernels_are_the_formula(matrix, dora):
    kernel = node(matrix, dora=dora)
    expected = merged64(kernel, matrix)
    np.testing.assert_allclose(jax.jit(lambda k: k.dense())(kernel), expected, atol=2e-5)
    rows = int(np.prod(expected.shape[1 : 1 + matrix.inputs]))
    x = RNG.normal(size=(5, rows))

    @jax.jit
    def product(kernel, x):
        layer = opened(jax.tree.map(lambda a: a[1], kernel), jnp.float32)
        return x @ layer.astype(jnp.float32).reshape(rows, -1)

    y = product(kernel, np.float32(x))
    np.testing.assert_allclose(y, x @ expected[1].reshape(rows, -1), atol=2e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_experts_are_merged_one_by_one(dora):
    matrix = Matrix(2, 1, 1)
    kernel = node(matrix, Merged, dora)
    expected = merged64(kernel, matrix)
    np.testing.assert_allclose(jax.jit(lambda k: k.dense())(kernel), expected, atol=2e-5)
    layer = jax.jit(lambda k: opened(jax.tree.map(lambda a: a[0], k), jnp.bfloat16))(kernel)
    assert layer.shape == (3, 16, 8)
    assert layer.dtype == jnp.bfloat16


def test_doras_norms_carry_no_gradient():
    """Liu et al. 2024, 4.3: the gradient of W' is m / |W'| times the product's, the norm being a constant."""
    kernel = jax.tree.map(lambda a: a[0], node(QUERY, dora=True))
    x = jnp.asarray(RNG.normal(size=(5, 16)), jnp.float32)
    summed = kernel.base.reshape(16, -1) + np.float32(0.7) * kernel.a @ kernel.b.reshape(3, -1)
    constant = np.linalg.norm(summed, axis=0)

    def own(a):
        return jnp.sum(jnp.sin(x @ opened(replace(kernel, a=a), jnp.float32)))

    def plain(a):
        w = kernel.base.reshape(16, -1) + 0.7 * a @ kernel.b.reshape(3, -1)
        return jnp.sum(jnp.sin(x @ w / constant * kernel.magnitude.reshape(-1)))

    np.testing.assert_allclose(*(jax.jit(jax.grad(of))(kernel.a) for of in (own, plain)), atol=1e-4)


def test_dropout_is_on_the_adapters_input_and_by_layer_and_key():
    kernel = node(QUERY, dropout=0.5)
    tree = {"one": kernel, "two": kernel, "plain": jnp.ones(3)}
    keyed = with_dropout(tree, jax.random.key(1))
    keys = np.concatenate([keyed["one"].key, keyed["two"].key])
    assert len({tuple(key) for key in keys.tolist()}) == 4
    assert with_dropout(tree, None) is tree
    layer = opened(jax.tree.map(lambda a: a[0], keyed["one"]), jnp.float32)
    x = jnp.ones((4000, 16))
    base = np.asarray(x @ kernel.base[0].reshape(16, -1))
    low = np.asarray(x @ layer) - base
    expected = 0.7 * np.asarray(kernel.a[0].sum(0) @ kernel.b[0].reshape(3, -1))
    assert np.std(low[:, 0]) > 0
    np.testing.assert_allclose(low.mean(0), expected, atol=0.2 * np.abs(expected).max() + 0.1)
    again = opened(jax.tree.map(lambda a: a[0], with_dropout(tree, jax.random.key(1))["one"]), jnp.float32)
    np.testing.assert_array_equal(x @ again, x @ layer)


def nf4_64(w: np.ndarray) -> np.ndarray:
    """NF4 of a matrix [inputs, outputs] in float64: blocks of 64 inputs, absmaxes exact, nearest of the 16 levels."""
    levels = np.array(NF4)
    blocks = w.reshape(-1, 64, w.shape[-1])
    absmax = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs((blocks / absmax)[..., None] - levels).argmin(-1)
    return (levels[nearest] * absmax).reshape(w.shape)


def test_nf4_is_near_the_nearest_levels():
    w = RNG.normal(size=(1, 128, 512)).astype(np.float32) * 0.02
    found = np.asarray(jax.jit(lambda w: Nf4.of(w, Matrix(1, 1, 1)).dense())(w))[0]
    expected = nf4_64(w[0].astype(np.float64))
    # The absmaxes are 8-bit floats, which moves a few numbers to the level beside.
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    error = np.linalg.norm(found - w[0]) / np.linalg.norm(w)
    assert 0.05 < error < 0.11  # 4 bits of a normal distribution


def test_nf4_takes_four_bits_and_an_eighth():
    quantized = jax.eval_shape(lambda: Nf4.of(jnp.ones((1, 256, 1024)), Matrix(1, 1, 1)))
    bits = 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(quantized)) / (256 * 1024)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


@pytest.mark.parametrize("kind", [Int8, Nf4])
@pytest.mark.parametrize("matrix", [QUERY, OUT], ids=["query", "out"])
def test_layers_are_quantized_one_by_one_and_zeros_stay(kind, matrix):
    w = jnp.asarray(RNG.normal(size=SHAPES[matrix]), jnp.float32).at[:, 0].set(0)
    of = jax.jit(kind.of, static_argnums=1)
    quantized = of(w, matrix)
    dense = jax.jit(lambda kernel: kernel.dense())
    whole = np.asarray(dense(quantized))
    alone = [dense(of(w[i : i + 1], matrix)) for i in range(2)]
    np.testing.assert_allclose(whole, np.concatenate(alone), atol=1e-6)
    np.testing.assert_array_equal(whole[:, 0], 0)
    layer = jax.tree.map(lambda a: np.asarray(a)[1], quantized)
    np.testing.assert_allclose(dense(layer), whole[1], atol=1e-6)
    low = cast_floats({"kernel": quantized}, jnp.bfloat16)["kernel"]
    np.testing.assert_array_equal(dense(low), whole)
    axes = kind.axes(("layers", "embed", "heads", "head_dim"), matrix)
    shapes = [leaf.ndim for leaf in jax.tree.leaves(quantized)]
    assert [len(own) for own in jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))] == shapes


def test_int8_is_within_half_a_step():
    w = RNG.normal(size=(2, 16, 4, 8)).astype(np.float32)
    found = Int8.of(jnp.asarray(w), QUERY).dense()
    steps = np.abs(w).max(1, keepdims=True) / 127
    assert np.all(np.abs(found - w) <= steps / 2 + 1e-6)


@pytest.mark.parametrize("adapter", [Lora(rank=2), Dora(rank=2), Lora(rank=2, base="nf4"), Dora(rank=2, base="int8")])
def test_axes_are_parallel_to_what_is_adapted(adapter, model, base):
    from lmx.models.model import param_axes

    axes = param_axes(model.spec())
    params = jax.jit(lambda base: adapter.adapt(base, axes, jax.random.key(0)))(base)
    laid = adapter.axes(axes)
    assert jax.tree.structure(params) == jax.tree.structure(laid, is_leaf=lambda x: isinstance(x, tuple))
    for leaf, own in zip(
        jax.tree.leaves(params), jax.tree.leaves(laid, is_leaf=lambda x: isinstance(x, tuple)), strict=True
    ):
        assert len(own) == leaf.ndim
    up = params["stack"]["segment_0"]["block_0"]["mlp"]["up"]["kernel"]
    of = jax.jit(densed)
    np.testing.assert_allclose(of(up), of(up.base), atol=1e-6)  # it changes nothing yet
