import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.decode.sampling import Sampling, choose
from lmx.errors import UserError

VOCAB, DRAWS = 12, 4000
LOGITS = np.array([2.0, 1.9, 1.5, 1.0, 0.5, 0.3, 0.0, -0.4, -1.0, -1.5, -3.0, 1.7])


def drawn(sampling: Sampling, logits=LOGITS, seen=None, rows: int = DRAWS):
    """Tokens [rows] and their log-probabilities, each row with its own key."""
    wide = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, VOCAB))
    if seen is None:
        seen = np.zeros((VOCAB if sampling.filters.penalised else 0,), bool)
    marked = jnp.broadcast_to(jnp.asarray(seen), (rows, len(seen)))
    keys = jax.random.split(jax.random.key(0), rows)
    chosen = jax.jit(choose, static_argnums=0)(sampling.filters, sampling.values(), wide, marked, keys)
    return tuple(np.asarray(a) for a in chosen)


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def reference(sampling: Sampling, seen=()) -> np.ndarray:
    """The distribution [vocab] that is drawn from: one filter after the other, each renormalised."""
    scores = LOGITS.copy()
    for token in seen:
        scores[token] *= 1 / sampling.repetition_penalty if scores[token] > 0 else sampling.repetition_penalty
    p = softmax(scores / sampling.temperature)
    peak = p.max()
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    if sampling.top_p < 1:
        enough = np.searchsorted(np.cumsum(p[order]), sampling.top_p) + 1
        p[order[enough:]] = 0
    floor = softmax(scores / sampling.temperature)
    p[floor < sampling.min_p * peak] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0),
        Sampling(top_k=1),
        Sampling(top_k=4),
        Sampling(top_k=100),
        Sampling(top_p=0.6),
        Sampling(top_p=0.01),
        Sampling(min_p=0.3),
        Sampling(temperature=1.5, top_k=6, top_p=0.8, min_p=0.4),
    ],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in vars(s).items() if v != vars(Sampling())[k]) or "plain",
)
def test_draws_follow_the_filtered_distribution(sampling):
    tokens, logprobs = drawn(sampling)
    expected = reference(sampling)
    shares = np.bincount(tokens, minlength=VOCAB) / DRAWS
    assert not shares[expected == 0].any()
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / DRAWS))
    np.testing.assert_allclose(logprobs, np.log(softmax(LOGITS))[tokens], atol=1e-5)  # the model's own


def test_repetition_penalty_lowers_what_was_seen():
    sampling, seen = Sampling(repetition_penalty=1.8), [0, 1, 8]
    tokens, logprobs = drawn(sampling, seen=np.isin(np.arange(VOCAB), seen))
    shares = np.bincount(tokens, minlength=VOCAB) / DRAWS
    np.testing.assert_allclose(shares, reference(sampling, seen), atol=4 * np.sqrt(0.25 / DRAWS))
    np.testing.assert_allclose(logprobs, np.log(softmax(LOGITS))[tokens], atol=1e-5)


def test_greedy_takes_the_likeliest_and_ignores_the_draw_filters():
    for sampling in (Sampling(temperature=0), Sampling(temperature=0, top_k=3, top_p=0.5, min_p=0.2)):
        assert set(drawn(sampling, rows=16)[0]) == {0}
    penalised = Sampling(temperature=0, repetition_penalty=1.3)
    assert set(drawn(penalised, seen=np.arange(VOCAB) == 0, rows=16)[0]) == {1}


def test_a_row_depends_on_its_own_key_alone():
    keys = jax.random.split(jax.random.key(1), 6)
    logits = np.random.default_rng(2).normal(size=(6, VOCAB)).astype(np.float32)
    sampling, none = Sampling(), np.zeros((6, 0), bool)
    draw = jax.jit(functools.partial(choose, sampling.filters, sampling.values()))
    some = np.array([4, 1])
    tokens, again = (np.asarray(draw(logits[of], none[of], keys[of])[0]) for of in (np.arange(6), some))
    assert again.tolist() == tokens[some].tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 1),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(UserError, match=f"{name} is {value}, expected"):
        Sampling(**{name: value})
