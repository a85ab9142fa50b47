"""Stochastic depth and hidden tokens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.models.families.llama import Llama
from lmx.models.model import Inputs
from lmx.models.specs import noisy
from lmx.nn.noise import StochasticDepth, TokenNoise
from tests.jitted import apply, init_params

MODEL = Llama(vocab=64, context=8, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16, tied=True)


@pytest.mark.parametrize(("layer", "keep"), [(0, 0.9), (3, 0.6)])
def test_depth_falls_linearly_and_keeps_the_mean(layer, keep):
    """Huang et al. 2016, eq. 4: layer l of n survives with 1 - l / n * (1 - p)."""
    x = jnp.ones((20_000, 1, 2))
    y = np.asarray(StochasticDepth(0.4, 4)(x, layer, jax.random.key(0)))
    assert set(np.unique(y.round(4))) == {0, np.float32(round(1 / keep, 4))}
    np.testing.assert_array_equal(y[..., 0], y[..., 1])  # whole rows
    assert (y > 0).mean() == pytest.approx(keep, abs=0.015)
    np.testing.assert_array_equal(StochasticDepth(0.4, 4)(x, layer, None), x)


def test_tokens_are_dropped_and_swapped_at_their_rates():
    tokens, noise = jnp.full((100, 200), 7, jnp.int32), TokenNoise(0.25, 0.5, 16)
    key = jax.random.key(0)
    swapped = np.asarray(noise.tokens(tokens, key))
    assert (swapped != 7).mean() == pytest.approx(0.5 * 15 / 16, abs=0.02)
    assert swapped.max() == 15
    dropped = np.asarray(noise.embeddings(jnp.ones((100, 200, 3)), key))
    assert (dropped == 0).all(-1).mean() == pytest.approx(0.25, abs=0.02)
    assert set(np.unique(dropped)) == {0, 1}
    np.testing.assert_array_equal(noise.tokens(tokens, None), tokens)


def test_a_model_draws_by_key_in_training_only():
    spec, rows = MODEL.spec(), Inputs.whole(jnp.arange(32, dtype=jnp.int32).reshape(4, 8))
    params = init_params(spec, jax.random.key(0))
    drawn = noisy(spec, depth=0.9, drop=0.3, swap=0.1)
    assert len(drawn.stack.segments) == 1  # the layers are still scanned
    run = jax.jit(lambda p, key: apply(drawn, p, rows, key=key).hidden)
    one, again, other = (run(params, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    plain = jax.jit(lambda p: apply(spec, p, rows).hidden)(params)
    np.testing.assert_array_equal(jax.jit(lambda p: apply(drawn, p, rows).hidden)(params), plain)
    assert replace(spec) == noisy(spec)


def test_the_last_layer_of_a_stack_that_is_always_skipped_adds_nothing():
    """With a rate near 1 the last layer's sublayers are skipped, and the model is that of one layer."""
    spec, rows = MODEL.spec(), Inputs.whole(jnp.zeros((2, 8), jnp.int32))
    params = init_params(spec, jax.random.key(0))
    first = lambda a: np.where(np.arange(len(a)).reshape(-1, *[1] * (a.ndim - 1)), a, 0)  # noqa: E731
    params = {**params, "stack": jax.tree.map(first, params["stack"])}  # layer 0 adds nothing
    drawn = noisy(spec, depth=1 - 1e-7)
    hidden = apply(drawn, params, rows, key=jax.random.key(3)).hidden
    empty = {**params, "stack": jax.tree.map(np.zeros_like, params["stack"])}
    np.testing.assert_allclose(hidden, apply(spec, empty, rows).hidden, atol=1e-6)
