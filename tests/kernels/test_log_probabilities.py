"""Log-probabilities of targets against whole logits, and their gradient against autodiff of these."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels.cross_entropy import Readout, readout_logits
from lmx.kernels.log_probabilities import log_probabilities

BATCH, LENGTH, VOCAB, PADDED, WIDTH = 2, 24, 37, 40, 8


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_and_gradients_are_those_of_whole_logits(softcap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmx.kernels.cross_entropy.CHUNK_ROWS", 12)  # several chunks
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, table = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH)), jax.random.normal(keys[1], (PADDED, WIDTH))
    bias = jax.random.normal(keys[2], (PADDED,))
    targets = jax.random.randint(keys[3], (BATCH, LENGTH), 0, VOCAB)
    weights = jax.random.normal(keys[4], (BATCH, LENGTH))

    def ours(*own: jax.Array) -> jax.Array:
        return log_probabilities(Readout(*own, VOCAB, softcap), targets)

    def plain(*own: jax.Array) -> jax.Array:
        logits = readout_logits(Readout(*own, VOCAB, softcap), (None, None, None))[..., :VOCAB]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]

    own = hidden, table, bias
    np.testing.assert_allclose(jax.jit(ours)(*own), jax.jit(plain)(*own), rtol=1e-5, atol=1e-5)
    found, expected = (
        jax.jit(jax.grad(lambda *a, f=f: (jnp.square(f(*a)) * weights).sum(), argnums=(0, 1, 2)))(*own)
        for f in (ours, plain)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_bfloat16_table_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    key = jax.random.key(1)
    hidden = jax.random.normal(key, (BATCH, LENGTH, WIDTH)).astype(jnp.bfloat16)
    table = jax.random.normal(key, (PADDED, WIDTH)).astype(jnp.bfloat16)
    targets = jnp.zeros((BATCH, LENGTH), jnp.int32)

    def gradient(rows: int) -> np.ndarray:
        monkeypatch.setattr("lmx.kernels.cross_entropy.CHUNK_ROWS", rows)
        of = lambda t: log_probabilities(Readout(hidden, t, None, VOCAB), targets).sum()  # noqa: E731
        return np.asarray(jax.jit(jax.grad(of))(table)).astype(np.float32)

    whole = gradient(4096)
    np.testing.assert_allclose(gradient(2), whole, atol=0.02 * np.abs(whole).max())
