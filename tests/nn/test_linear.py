"""Linear maps: their own backward pass is that of the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmx.nn.linear import Linear
from lmx.nn.module import Params, Part


def test_gradients_are_the_formulas_over_joined_axes() -> None:
    axes = ("heads", "head_dim", "embed", None)
    part = Part(lambda declared: Linear((3, 4), (5, 2), axes, std=1.0, bias=True, declared=declared))
    params = part.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {"kernel": (3, 4, 5, 2), "bias": (5, 2)}
    rng = np.random.default_rng(0)
    x, d_y = rng.normal(size=(2, 7, 3, 4)), rng.normal(size=(2, 7, 5, 2))
    kernel = np.asarray(params["kernel"], np.float64)

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(params: Params, x: jax.Array) -> jax.Array:
        return (part.bind(params)(x) * d_y).sum()

    value, (d_params, d_x) = jax.jit(loss)(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(value, (np.einsum("blij,ijkm->blkm", x, kernel) * d_y).sum(), rtol=1e-4)
    np.testing.assert_allclose(d_x, np.einsum("blkm,ijkm->blij", d_y, kernel), atol=1e-5)
    np.testing.assert_allclose(d_params["kernel"], np.einsum("blij,blkm->ijkm", x, d_y), atol=1e-5)
    np.testing.assert_allclose(d_params["bias"], d_y.sum((0, 1)), atol=1e-5)
