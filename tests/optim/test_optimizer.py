from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from lmx.models.model import param_shapes
from lmx.optim.optimizer import AdamW

RATE = 0.01


def drawn(seed: int) -> dict:
    kernel, bias = jax.random.split(jax.random.key(seed))
    return {"kernel": jax.random.normal(kernel, (3, 4)), "bias": jax.random.normal(bias, (4,))}


def trained(optimizer: AdamW, steps: int) -> tuple[dict, object]:
    params, transformation = drawn(0), optimizer.build({})
    state = transformation.init(params)
    for step in range(steps):
        updates, state = transformation.update(drawn(step + 1), state, params)
        params = jax.tree.map(lambda p, u: p - RATE * u, params, updates)
    return params, state


def reference(optimizer: AdamW, steps: int) -> dict:
    """AdamW in float64, from the paper's algorithm 2; the biases do not decay."""
    params = {name: np.asarray(p, np.float64) for name, p in drawn(0).items()}
    m = {name: np.zeros_like(p) for name, p in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    for t in range(1, steps + 1):
        for name, g in drawn(t).items():
            g = np.asarray(g, np.float64)
            m[name] = optimizer.b1 * m[name] + (1 - optimizer.b1) * g
            v[name] = optimizer.b2 * v[name] + (1 - optimizer.b2) * g**2
            step = m[name] / (1 - optimizer.b1**t) / (np.sqrt(v[name] / (1 - optimizer.b2**t)) + optimizer.eps)
            decay = 0 if name == "bias" else optimizer.weight_decay
            params[name] = params[name] - RATE * (step + decay * params[name])
    return params


def test_adamw_equals_float64_reference():
    optimizer = AdamW(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.5)
    params, _ = trained(optimizer, 5)
    for name, expected in reference(optimizer, 5).items():
        np.testing.assert_allclose(params[name], expected, rtol=2e-6, atol=2e-7)


def moments(state: object) -> optax.ScaleByAdamState:
    adam = [s for s in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)) if s]
    return next(s for s in adam if isinstance(s, optax.ScaleByAdamState))


def test_bfloat16_moments_are_stored_and_near():
    optimizer = AdamW(moments="bfloat16")
    params, state = trained(optimizer, 5)
    adam = moments(state)
    assert {a.dtype for a in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype(jnp.bfloat16)}
    assert adam.count.dtype == jnp.int32
    exact, exact_state = trained(replace(optimizer, moments="float32"), 5)
    assert {a.dtype for a in jax.tree.leaves(moments(exact_state).mu)} == {jnp.dtype(jnp.float32)}
    for name in params:
        np.testing.assert_allclose(params[name], exact[name], atol=RATE * 0.1)
        assert np.any(np.asarray(params[name]) != np.asarray(exact[name]))


@pytest.mark.parametrize(("b2", "stored"), [(0.999, jnp.float32), (0.95, jnp.bfloat16)])
def test_stored_second_moments_follow_gradients_that_shrink(b2, stored):
    def steps(optimizer):
        transformation, params = optimizer.build({}), {"kernel": jnp.zeros(4)}

        def step(state, size):
            return transformation.update({"kernel": jnp.full(4, size)}, state, params)[1], None

        sizes = jnp.where(jnp.arange(8000) < 1000, 1.0, 0.1)
        return moments(jax.lax.scan(step, transformation.init(params), sizes)[0]).nu["kernel"]

    exact = steps(AdamW(b2=b2))
    near = steps(AdamW(b2=b2, moments="bfloat16"))
    assert near.dtype == stored
    np.testing.assert_allclose(near.astype(jnp.float32), exact, rtol=0.06)


DECAYED = {
    "gpt2": {
        "embedding/table",
        *(f"stack/segment_0/block_0/attention/{part}/kernel" for part in ("query", "key", "value", "out")),
        *(f"stack/segment_0/block_0/mlp/{part}/kernel" for part in ("up", "down")),
    },
    "llama": {
        "embedding/table",
        "head/table",
        *(f"stack/segment_0/block_0/attention/{part}/kernel" for part in ("query", "key", "value", "out")),
        *(f"stack/segment_0/block_0/mlp/{part}/kernel" for part in ("up", "gate", "down")),
    },
}


def test_only_kernels_and_tables_decay(golden):
    decays = flatten_dict(AdamW().decayed(param_shapes(golden.spec)), sep="/")
    assert {name for name, yes in decays.items() if yes} == DECAYED[golden.config.family]


@pytest.mark.parametrize(("patterns", "expected"), [((), {"kernel", "bias"}), (("k*",), {"bias"})])
def test_patterns_choose_what_decays(patterns, expected):
    decays = AdamW(no_decay=patterns).decayed(drawn(0))
    assert {name for name, yes in decays.items() if yes} == expected
