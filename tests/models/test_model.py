import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.models.model import Inputs, empty_cache, param_shapes
from tests.jitted import apply, init_params, logits, unstack_layers

TIGHT = {"atol": 1e-5, "rtol": 1e-5}


def forward(golden, params, inputs, **options):
    run = jax.jit(lambda p, x: apply(golden.spec, p, x, **options).hidden)
    return np.asarray(run(params, inputs))


@pytest.fixture(scope="module")
def full(golden):
    """The scanned model's hidden states of the golden tokens."""
    return forward(golden, golden.params, Inputs.whole(jnp.asarray(golden.tokens)))


def test_unrolled_equals_scanned(golden, full):
    unrolled = forward(golden, unstack_layers(golden.spec, golden.params), Inputs.whole(jnp.asarray(golden.tokens)))
    np.testing.assert_allclose(unrolled, full, **TIGHT)


@pytest.mark.parametrize("prompt", [1, 9])
def test_prefill_and_steps_equal_the_full_forward(golden, full, prompt):
    params = unstack_layers(golden.spec, golden.params)
    whole = Inputs.whole(jnp.asarray(golden.tokens))
    cache = empty_cache(golden.spec, whole.tokens.shape[0], 32, jnp.float32)
    step = jax.jit(lambda inputs, cache: apply(golden.spec, params, inputs, cache=cache))
    cuts, hidden = [0, *range(prompt, whole.tokens.shape[1] + 1)], []
    for start, end in itertools.pairwise(cuts):
        out = step(jax.tree.map(lambda a, s=start, e=end: a[:, s:e], whole), cache)
        hidden, cache = [*hidden, out.hidden], out.cache
    np.testing.assert_allclose(np.concatenate(hidden, axis=1), full, **TIGHT)


def packed(tokens: np.ndarray, lengths: tuple[int, ...]) -> Inputs:
    """Each row cut into documents of these lengths; what is left is padding."""
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    start = 0
    for number, length in enumerate(lengths, 1):
        segments[:, start : start + length] = number
        positions[:, start : start + length] = np.arange(length)
        start += length
    return Inputs(*(jnp.asarray(a) for a in (tokens, positions, segments)))


def test_packed_documents_do_not_see_each_other(golden, full):
    lengths = (10, 8)
    before = forward(golden, golden.params, packed(golden.tokens, lengths))
    changed = golden.tokens.copy()
    changed[:, 3] = (changed[:, 3] + 1) % golden.config.vocab
    changed[:, 20] = (changed[:, 20] + 1) % golden.config.vocab  # padding
    after = forward(golden, golden.params, packed(changed, lengths))
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert np.abs(after[:, 3:10] - before[:, 3:10]).max(-1).min() > 1e-4
    np.testing.assert_array_equal(after[:, 10:18], before[:, 10:18])
    np.testing.assert_allclose(before[:, :10], full[:, :10], **TIGHT)  # as if it stood alone


def test_a_packed_document_equals_the_document_alone(golden):
    together = forward(golden, golden.params, packed(golden.tokens, (10, 8)))
    alone = forward(golden, golden.params, Inputs.whole(jnp.asarray(golden.tokens[:, 10:18])))
    np.testing.assert_allclose(together[:, 10:18], alone, **TIGHT)


@pytest.fixture(scope="module")
def gradient(llama):
    """The gradient of some function of the hidden states, by remat policy."""
    inputs = Inputs.whole(jnp.asarray(llama.tokens))

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def of(params, remat):
        return jnp.sin(apply(llama.spec, params, inputs, remat=remat).hidden).sum()

    return functools.cache(lambda remat: jax.tree.leaves(of(llama.params, remat)))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(gradient, remat):
    for a, b in zip(gradient("none"), gradient(remat), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max(), rtol=1e-4)


@pytest.fixture(scope="module")
def dropping(gpt2):
    """Hidden states by key of the model with dropout."""
    spec = replace(gpt2.config, dropout=0.3).spec()
    inputs = Inputs.whole(jnp.asarray(gpt2.tokens))
    run = jax.jit(lambda params, key: apply(spec, params, inputs, key=key).hidden)
    return lambda key: np.asarray(run(gpt2.params, key))


def test_dropout_is_deterministic_by_key(dropping):
    np.testing.assert_array_equal(dropping(jax.random.key(1)), dropping(jax.random.key(1)))
    assert np.abs(dropping(jax.random.key(1)) - dropping(jax.random.key(2))).max() > 0.1


def test_dropout_is_off_without_a_key(dropping, gpt2):
    plain = forward(gpt2, gpt2.params, Inputs.whole(jnp.asarray(gpt2.tokens)))
    np.testing.assert_allclose(dropping(None), plain, **TIGHT)
    assert np.abs(dropping(jax.random.key(1)) - plain).max() > 0.1


def test_fresh_parameters(llama):
    init = jax.jit(functools.partial(init_params, llama.spec))
    params, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, param_shapes(llama.spec))
    kernels = [p["stack"]["segment_0"]["block_0"]["mlp"]["up"]["kernel"] for p in (params, again, other)]
    assert np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])
    assert not np.array_equal(*kernels[0])  # each layer draws its own
    assert float(kernels[0].std()) == pytest.approx(0.02, rel=0.1)


def test_logits_of_bfloat16_are_float32_and_near(golden, full):
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), golden.params)
    hidden = apply(golden.spec, low, Inputs.whole(jnp.asarray(golden.tokens))).hidden
    assert hidden.dtype == jnp.bfloat16
    scores = logits(golden.spec, low, hidden)
    assert scores.dtype == jnp.float32
    error = np.abs(np.asarray(scores)[..., : golden.config.vocab] - golden.logits)
    assert error.mean() < 0.02 * np.abs(golden.logits).mean()
