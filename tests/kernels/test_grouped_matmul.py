import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels.grouped_matmul import grouped_matmul, looped, megablox

FORMS = {"entry": grouped_matmul, "looped": looped, "ragged": jax.lax.ragged_dot}
FORMS["megablox"] = functools.partial(megablox, interpret=True)
CASES = {
    "uneven": (5, 0, 1, 70),
    "last empty": (9, 3, 0, 0),
    "one group has all": (0, 0, 40, 0),
    "fewer rows than groups": (1, 0, 0, 1),
    "one group": (6,),
}


def problem(sizes, extra=0, seed=0):
    """Random rows, kernels [groups, 12, 20] and output weights; ``extra`` rows at the end belong to no group."""
    rng = np.random.default_rng(seed)
    rows = sum(sizes) + extra
    x, kernels, weights = (
        rng.normal(size=(rows, 12)),
        rng.normal(size=(len(sizes), 12, 20)),
        rng.normal(size=(rows, 20)),
    )
    return x, kernels, weights, np.repeat(np.arange(len(sizes)), sizes)


def slowly(x, kernels, weights, groups):
    """The product row by row, and the gradients of sum(weights * product), in float64."""
    out, d_x, d_kernels = np.zeros(weights.shape), np.zeros(x.shape), np.zeros(kernels.shape)
    for row, group in enumerate(groups):
        out[row] = x[row] @ kernels[group]
        d_x[row] = kernels[group] @ weights[row]
        d_kernels[group] += np.outer(x[row], weights[row])
    return out, d_x, d_kernels


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form, sizes):
    x, kernels, weights, groups = problem(sizes, extra=3)
    count = len(groups)

    @jax.jit
    def run(x, kernels):
        def total(x, kernels):
            out = FORMS[form](x, kernels, jnp.array(sizes, jnp.int32))
            return jnp.where(jnp.arange(len(x))[:, None] < count, weights * out, 0).sum(), out

        return jax.value_and_grad(total, (0, 1), has_aux=True)(x, kernels)

    (_, out), gradients = run(jnp.asarray(x, jnp.float32), jnp.asarray(kernels, jnp.float32))
    expected = slowly(x, kernels, weights, groups)
    for got, right in zip((out, *gradients), expected, strict=True):
        cut = slice(None) if got.shape == kernels.shape else slice(count)
        np.testing.assert_allclose(got[cut], right[cut], atol=1e-4, rtol=1e-4)


def test_bfloat16_keeps_its_dtype_and_accumulates_the_kernels_gradient_in_float32():
    x, kernels, weights, groups = problem((300, 1))
    low = [jnp.asarray(a, jnp.bfloat16) for a in (x, kernels, weights)]
    sizes = jnp.array((300, 1), jnp.int32)
    d_kernels = jax.grad(lambda k: (low[2] * grouped_matmul(low[0], k, sizes)).sum().astype(jnp.float32))(low[1])
    assert grouped_matmul(low[0], low[1], sizes).dtype == d_kernels.dtype == jnp.bfloat16
    exact = slowly(*(np.asarray(a, np.float64) for a in low), groups)[2]
    np.testing.assert_allclose(np.asarray(d_kernels, np.float64), exact, atol=1e-2 * np.abs(exact).max())


@pytest.mark.parametrize(("rows", "groups"), [(1, 8), (300, 2), (4096, 2)])
def test_what_each_platform_lowers_to(rows, groups):
    arguments = (jnp.zeros((rows, 256)), jnp.zeros((groups, 256, 128)), jnp.zeros(groups, jnp.int32))
    text = {
        p: jax.jit(grouped_matmul).trace(*arguments).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")
    }
    assert "tpu_custom_call" in text["tpu"]
    assert "stablehlo.while" in text["cpu"]
    assert "tpu_custom_call" not in text["cpu"]
