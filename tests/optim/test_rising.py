import jax.numpy as jnp
import numpy as np
import pytest

from lmx.errors import LmxError, UserError
from lmx.optim.rising import Rising, Smoother, Sweep


def test_rates_rise_exponentially():
    schedule = Rising(first=1e-5, last=1e-1)
    rates = [float(schedule.at(jnp.int32(step), 5)) for step in range(5)]
    np.testing.assert_allclose(rates, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1], rtol=1e-4)
    for bad in ({"first": 0.0}, {"first": 1.0, "last": 0.1}):
        with pytest.raises(UserError, match="expected above 0 and rising"):
            Rising(**bad).check(100)
    with pytest.raises(UserError, match="tells nothing"):
        schedule.check(5)


def test_smoothing_is_a_weighted_mean_and_ends_on_divergence():
    smoother, losses = Smoother(0.5, 1.5), [4.0, 3.0, 2.0]
    found = [smoother.push(loss) for loss in losses]
    for i, (value, diverged) in enumerate(found):
        weights = 0.5 ** np.arange(i + 1)[::-1]
        assert value == pytest.approx(np.average(losses[: i + 1], weights=weights))
        assert not diverged
    assert smoother.push(9.0)[1]
    assert Smoother(0.5, 1.5).push(float("nan"))[1]
    with pytest.raises(UserError, match=r"stop 1\.0"):
        Smoother(0.5, 1.0)


def test_the_suggestion_is_a_tenth_of_the_lowest():
    rates = np.logspace(-5, 0, 51)
    losses = 5 - 2 / (1 + np.exp(-4 * (np.log10(rates) + 3))) + 6 * np.maximum(0, np.log10(rates) + 1.5)
    sweep = Sweep(tuple(rates), tuple(losses), tuple(losses), True)
    assert sweep.lowest == pytest.approx(10**-1.5, rel=1e-6)
    assert sweep.suggested == pytest.approx(10**-2.5, rel=1e-6)
    assert sweep.steepest == pytest.approx(1e-3, rel=1e-6)
    with pytest.raises(LmxError, match="did not fall"):
        Sweep((1e-3, 1e-2, 1e-1), (3.0, 4.0, 5.0), (3.0, 4.0, 5.0), True).check()
