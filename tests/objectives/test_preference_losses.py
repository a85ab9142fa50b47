"""The losses of pairs against their papers' formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.objectives.preference import Completion, Dpo, Hinge, Ipo, Orpo, PreferenceLoss, SimPo, by_segment


def completions(seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return -rng.uniform(1, 30, (2, 3)), -rng.uniform(1, 30, (2, 3)), rng.integers(1, 9, (2, 3)).astype(np.float64)


(CP, CR, CN), (RP, RR, RN) = completions(0), completions(1)
H = (CP - CR) - (RP - RR)


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-x))


def log_odds(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    mean = np.exp(p / n)
    return np.log(mean / (1 - mean))


EXPECTED: list[tuple[PreferenceLoss, np.ndarray, np.ndarray]] = [
    (Dpo(0.3), -log_sigmoid(0.3 * H), H),
    (Dpo(0.3, 0.2), -0.8 * log_sigmoid(0.3 * H) - 0.2 * log_sigmoid(-0.3 * H), H),
    (Ipo(0.2), (H - 2.5) ** 2, H),
    (Hinge(0.5), np.maximum(0, 1 - 0.5 * H), H),
    (SimPo(2.0, 0.7), -log_sigmoid(2 * (CP / CN - RP / RN) - 0.7), CP / CN - RP / RN),
    (Orpo(0.25), -0.25 * log_sigmoid(log_odds(CP, CN) - log_odds(RP, RN)), log_odds(CP, CN) - log_odds(RP, RN)),
]


@pytest.mark.parametrize(("loss", "expected", "margin"), EXPECTED, ids=lambda x: type(x).__name__)
def test_losses_and_margins_are_the_papers(loss: PreferenceLoss, expected: np.ndarray, margin: np.ndarray) -> None:
    told = jax.jit(lambda *pair: (loss.losses(*pair), loss.margin(*pair)))
    losses, margins = told(Completion(CP, CR, CN), Completion(RP, RR, RN))
    np.testing.assert_allclose(losses, expected, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(margins, margin, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [case[0] for case in EXPECTED], ids=lambda x: type(x).__name__)
def test_pairs_that_are_not_there_have_finite_gradients(loss: PreferenceLoss) -> None:
    zero = jnp.zeros((1, 1))
    of = lambda p: loss.losses(Completion(p, zero, zero), Completion(p, zero, zero)).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(of))(zero)
    assert np.isfinite(gradient).all()


def test_sums_by_segment() -> None:
    rng = np.random.default_rng(2)
    values, segments = rng.normal(size=(3, 7)).astype(np.float32), rng.integers(0, 8, (3, 7)).astype(np.int32)
    found = jax.jit(by_segment)(values, segments)
    assert found.shape == (3, 8)
    for row in range(3):
        for segment in range(1, 9):
            np.testing.assert_allclose(
                found[row, segment - 1], values[row][segments[row] == segment].sum(), rtol=1e-5, atol=1e-6
            )
