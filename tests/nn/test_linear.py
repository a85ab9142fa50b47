"""Linear maps: their own backward pass is that of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmx.nn.linear import Linear


def test_gradients_are_the_formulas_over_joined_axes() -> None:
    linear = Linear((3, 4), (5, 2), ("heads", "head_dim", "embed", None), std=1.0, bias=True, rngs=nnx.Rngs(params=0))
    rng = np.random.default_rng(0)
    x, d_y = rng.normal(size=(2, 7, 3, 4)), rng.normal(size=(2, 7, 5, 2))
    kernel = np.asarray(linear.kernel[...], np.float64)

    def loss(state: nnx.State, x: jax.Array) -> jax.Array:
        return (nnx.merge(structure, state)(x) * d_y).sum()

    structure, state = nnx.split(linear)
    value, (d_state, d_x) = jax.value_and_grad(loss, (0, 1))(state, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(value, (np.einsum("blij,ijkm->blkm", x, kernel) * d_y).sum(), rtol=1e-4)
    np.testing.assert_allclose(d_x, np.einsum("blkm,ijkm->blij", d_y, kernel), atol=1e-5)
    np.testing.assert_allclose(d_state["kernel"][...], np.einsum("blij,blkm->ijkm", x, d_y), atol=1e-5)
    np.testing.assert_allclose(d_state["bias"][...], d_y.sum((0, 1)), atol=1e-5)
