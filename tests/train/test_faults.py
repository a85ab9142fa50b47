"""Three faults of the check of faults, and what it says when something is wrong."""

import signal
from dataclasses import replace

import pytest

from lmx.errors import LmxError, UserError
from lmx.train.check_faults import FIRST, Fault, FaultCheck, Outcome, check_faults, random_faults

STEPS = 90


def test_a_run_survives_a_kill_a_flipped_bit_and_a_sigterm() -> None:
    faults = (
        Fault(FIRST, while_saving=True),
        Fault(FIRST + 14, damage="flip"),
        Fault(FIRST + 31, "SIGTERM"),
    )
    said: list[str] = []
    checked = check_faults(faults, STEPS, seed=3, progress=said.append)
    assert checked.problems() == []
    checked.verify()
    killed, robbed, stopped = checked.outcomes
    assert [o.exit_code for o in checked.outcomes] == [-signal.SIGKILL, -signal.SIGKILL, 75]
    assert 0 < killed.resumed <= killed.step
    assert int(robbed.damage.split("/")[0]) > robbed.resumed > 0
    assert stopped.resumed >= stopped.step > FIRST
    assert "3 faults" in checked.verdict()
    assert len(said) == 5


GOOD = Outcome("SIGKILL", False, step=44, exit_code=-9, damage="", expected=40, resumed=40)


@pytest.mark.parametrize(
    ("outcome", "different", "message"),
    [
        (replace(GOOD, resumed=0), (), "went on from step 0; the newest good checkpoint was 40"),
        (replace(GOOD, signal="SIGTERM"), (), "SIGTERM after step 44 gave exit code -9, expected 75"),
        (GOOD, ("loss of step 3 is 1.0, undisturbed 2.0", "ema/x differs"), "loss of step 3 .*and 1 more"),
    ],
)
def test_whatever_is_wrong_fails_the_check(outcome: Outcome, different: tuple[str, ...], message: str) -> None:
    checked = FaultCheck(STEPS, (GOOD, outcome), different)
    assert not checked.data()["same"]
    with pytest.raises(LmxError, match=message):
        checked.verify()


def test_random_faults_are_as_many_as_asked_and_of_every_kind() -> None:
    faults = random_faults(20, 300, seed=1)
    assert faults == random_faults(20, 300, seed=1) != random_faults(20, 300, seed=2)
    assert [f.signal for f in faults].count("SIGKILL") == 20
    assert {f.signal for f in faults} == {"SIGKILL", "SIGTERM", "SIGINT"}
    assert {f.damage for f in faults} == {"", "truncate", "flip"}
    assert {f.while_saving for f in faults} == {True, False}
    steps = [f.step for f in faults]
    assert steps[0] >= FIRST
    assert sorted(set(steps)) == steps
    with pytest.raises(UserError, match="--runs 20, --steps 60: expected at least 1 run and 73 steps"):
        random_faults(20, 60, seed=0)
