"""The tiny models against what transformers computes for them (tests/golden/make.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.checkpoint.huggingface import export_tensors
from lmx.models.model import Inputs, apply, logits
from lmx.objectives.next_token import NextToken


@pytest.fixture(scope="module")
def ours(golden):
    """Our logits [batch, length, padded vocab]."""

    @jax.jit
    def run(params, tokens):
        return logits(golden.spec, params, apply(golden.spec, params, Inputs.whole(tokens)).hidden)

    return np.asarray(run(golden.params, golden.tokens))


def test_logits(golden, ours):
    np.testing.assert_allclose(ours[..., : golden.config.vocab], golden.logits, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(ours.argmax(-1), golden.logits.argmax(-1))


def test_padding_of_the_vocabulary_is_masked(golden, ours):
    assert ours.shape[-1] % 128 == 0
    assert ours[..., golden.config.vocab :].max() < -1e37


@pytest.fixture(scope="module")
def loss_and_gradients(golden):
    """Through the chunked vocabulary loss, over all positions but the last."""
    spec, whole = golden.spec, Inputs.whole(jnp.asarray(golden.tokens[:, :-1]))
    batch = {"tokens": whole.tokens, "positions": whole.positions, "segment_ids": whole.segments}
    batch["targets"] = jnp.asarray(golden.tokens[:, 1:])

    @jax.jit
    @jax.value_and_grad
    def mean(params):
        sums = NextToken().loss(spec, params, batch)
        return sums.total / sums.weight

    loss, gradients = mean(golden.params)
    return float(loss), export_tensors(golden.config, gradients)


def test_loss(golden, loss_and_gradients):
    assert loss_and_gradients[0] == pytest.approx(golden.loss, rel=1e-6)


def test_gradients(golden, loss_and_gradients):
    for name, expected in golden.gradients.items():
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(loss_and_gradients[1][name], expected, atol=1e-6, rtol=1e-4, err_msg=name)
