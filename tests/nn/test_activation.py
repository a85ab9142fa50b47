"""Activations against formulas in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lmx.nn.activation import gelu


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_gelu_is_exact_to_its_dtype_below_zero_too(dtype: jnp.dtype, error: float) -> None:
    x = jnp.linspace(-3, 3, 101).astype(dtype)
    expected = [float(v) * 0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in x]
    found = gelu(x)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=error, atol=1e-6)
