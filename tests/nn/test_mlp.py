import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.nn.activation import ACTIVATIONS, ClampedGlu, Glu
from lmx.nn.context import Context
from lmx.nn.mlp import Mlp

CONTEXT = Context(jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), jnp.int32))


def applied(spec):
    """The layer's parameters in float64, an input, and the output for it."""
    part = spec.inner(8)
    params = jax.tree.map(lambda a: a + 0.1, part.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (2, 3, 8)) * 4
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    return wide, np.asarray(x, np.float64), part.bind(params)(x, CONTEXT).hidden


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_plain():
    params, x, out = applied(Mlp(hidden=16, activation="relu", bias=True, std=0.5))
    hidden = np.maximum(x @ params["up"]["kernel"] + params["up"]["bias"], 0)
    np.testing.assert_allclose(out, hidden @ params["down"]["kernel"] + params["down"]["bias"], atol=1e-4, rtol=1e-4)
    assert "gate" not in params


def test_gated():
    params, x, out = applied(Mlp(hidden=16, activation=Glu("silu"), std=0.5))
    gate, up = (x @ params[name]["kernel"] for name in ("gate", "up"))
    np.testing.assert_allclose(out, (gate * sigmoid(gate) * up) @ params["down"]["kernel"], atol=1e-4, rtol=1e-4)
    assert "bias" not in params["up"]


def test_clamped_gating():
    params, x, out = applied(Mlp(hidden=16, activation=ClampedGlu(alpha=1.5, limit=2.0), std=2.0))
    gate, up = (x @ params[name]["kernel"] for name in ("gate", "up"))
    assert gate.min() < -2 < 2 < gate.max()
    gate, up = np.minimum(gate, 2), np.clip(up, -2, 2)
    expected = (gate * sigmoid(1.5 * gate) * (up + 1)) @ params["down"]["kernel"]
    np.testing.assert_allclose(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "at_one", "at_minus_three"),
    [
        ("gelu", 0.8413447, -0.0040497),
        ("gelu_tanh", 0.8411920, -0.0036374),
        ("relu", 1.0, 0.0),
        ("silu", 0.7310586, -0.1422776),
        ("tanh", 0.7615942, -0.9950548),
    ],
)
def test_activations(name, at_one, at_minus_three):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.array([1.0, -3.0])), [at_one, at_minus_three], atol=1e-6)
