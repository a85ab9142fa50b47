import math

import pytest

from lmx.errors import UserError
from lmx.optim.schedule import SHAPES, Schedule

PEAK, WARMUP, STEPS, FINAL, DECAY = 2e-3, 10, 110, 0.1, 0.2


def expected(shape: str, step: int) -> float:
    """The formulas, for a step after the warmup."""
    done = (step - WARMUP) / (STEPS - WARMUP)
    share = {
        "constant": 1.0,
        "cosine": FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2,
        "linear": 1 - (1 - FINAL) * done,
        "rsqrt": math.sqrt(WARMUP / (step + 1)),
        "wsd": 1.0 if step < 88 else 1 - (1 - FINAL) * (step - 88) / 22,
    }
    return PEAK * share[shape]


def schedule(shape: str, **changes) -> Schedule:
    return Schedule(shape=shape, peak=PEAK, warmup=WARMUP, final=FINAL, decay=DECAY, **changes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [10, 35, 60, 88, 99, 109])
def test_shape(shape, step):
    assert float(schedule(shape).at(step, STEPS)) == pytest.approx(expected(shape, step), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_warmup_rises_to_the_peak(shape):
    rates = [float(schedule(shape).at(step, STEPS)) for step in range(WARMUP)]
    assert rates == pytest.approx([PEAK * (step + 1) / WARMUP for step in range(WARMUP)], rel=1e-5)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_ends_at_the_final_share_and_stays(shape):
    assert float(schedule(shape).at(STEPS, STEPS)) == pytest.approx(PEAK * FINAL, rel=1e-5)
    assert float(schedule(shape).at(2 * STEPS, STEPS)) == pytest.approx(PEAK * FINAL, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_warmup_starts_at_the_peak(shape):
    assert float(Schedule(shape=shape, peak=PEAK, warmup=0).at(0, STEPS)) == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("changes", "steps", "words"),
    [
        ({"warmup": 20}, 20, "schedule.warmup is 20 steps"),
        ({"warmup": -1}, 20, "schedule.warmup is -1 steps"),
    ],
)
def test_numbers_that_make_no_schedule(changes, steps, words):
    with pytest.raises(UserError, match=words):
        Schedule(**changes).check(steps)
