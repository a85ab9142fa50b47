"""Faults of the check of faults, in one process and in a job of two, and what it says when something is wrong."""

import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmx.errors import LmxError, UserError
from lmx.train.check_faults import (
    CYCLE,
    END_SECONDS,
    FIRST,
    Fault,
    FaultCheck,
    Outcome,
    _wound,
    check_faults,
    random_faults,
)

STEPS = 66
KILLS = (
    Fault(FIRST, moment="saving"),
    Fault(FIRST + 2, damage="flip"),
    Fault(FIRST + 14, damage="truncate"),
)
EVERY_KIND = (
    Fault(FIRST, moment="saving", damage="flip"),
    Fault(FIRST + 2, damage="truncate"),
    Fault(FIRST + 4, "SIGSTOP"),
    Fault(FIRST + 6, "SIGTERM"),
    Fault(FIRST + 8, "full disk", damage="truncate"),
    Fault(FIRST + 14, "SIGINT"),
)


def test_one_process_survives_three_kills_and_a_fault_after_its_end_is_missed() -> None:
    checked = check_faults([*KILLS, Fault(STEPS + 1)], STEPS, seed=5)
    assert checked.problems() == [
        "1 of 4 faults did not come, because the run reached step 66 first (steps go on while a fault ends the job): "
        "about --steps 88 has room for all"
    ]
    assert [o.exit_code for o in checked.outcomes] == [75, 75, 75]
    assert [o.damage.split(" ")[1] if o.damage else "" for o in checked.outcomes] == ["", "bit", "cut"]


def test_a_job_of_two_processes_survives_every_kind_of_fault() -> None:
    said: list[str] = []
    checked = check_faults(EVERY_KIND, STEPS, processes=2, seed=3, progress=said.append)
    assert checked.problems() == []
    checked.verify()
    killed, truncated, stopped, told, full, interrupted = checked.outcomes
    assert [o.exit_code for o in checked.outcomes] == [75, 75, 75, 75, 1, 75]
    for robbed in (killed, truncated, full):
        assert robbed.step >= int(robbed.damage.split("/")[0]) > robbed.resumed > 0
    assert told.resumed >= told.step > stopped.step
    assert interrupted.resumed >= interrupted.step > full.step
    assert "6 faults in a job of 2 processes" in checked.verdict()
    assert len(said) == 8
    spent = checked.goodput["seconds"]
    assert checked.goodput["attempts"] == 7
    assert all(spent[kind] > 0 for kind in ("steps", "repeated", "start_up", "compile", "checkpoint", "restart"))
    assert sum(spent.values()) == pytest.approx(checked.goodput["wall_seconds"])
    assert checked.goodput["wall_seconds"] < checked.seconds


@pytest.mark.slow
def test_one_process_survives_them_too() -> None:
    assert check_faults(EVERY_KIND, STEPS, seed=4).problems() == []


GOOD = Outcome("SIGKILL", "training", 1, step=44, exit_code=75, seconds=3, damage="", expected=40, resumed=40)


@pytest.mark.parametrize(
    ("outcome", "different", "message"),
    [
        (replace(GOOD, resumed=0), (), "went on from step 0; the newest good checkpoint was 40"),
        (replace(GOOD, exit_code=1), (), "SIGKILL of process 1 after step 44 gave exit code 1, expected 75"),
        (replace(GOOD, kind="full disk"), (), "full disk of process 1 after step 44 gave exit code 75, expected 1"),
        (replace(GOOD, seconds=99), (), f"the job ended 99 s later, expected within {END_SECONDS:.0f} s"),
        (GOOD, ("loss of step 3 is 1.0, undisturbed 2.0", "ema/x differs"), "loss of step 3 .*and 1 more"),
    ],
)
def test_whatever_is_wrong_fails_the_check(outcome: Outcome, different: tuple[str, ...], message: str) -> None:
    checked = FaultCheck(STEPS, 2, "a tmpfs", (GOOD, outcome), 0, different, {}, 1.0)
    assert not checked.data()["same"]
    with pytest.raises(LmxError, match=message):
        checked.verify()


@pytest.mark.parametrize("kind", ["SIGTERM", "full disk"])
def test_a_fault_just_before_the_end_is_missed_and_one_that_goes_unnoticed_fails(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmx.train.check_faults._await_moment", lambda *given: None)
    process = SimpleNamespace(process=SimpleNamespace(send_signal=lambda number: None))
    disk: Any = SimpleNamespace(fill=lambda: None, free=lambda: None)

    def wound(*steps: int) -> Any:
        told = iter(steps)
        job = SimpleNamespace(
            finished=lambda: False, step=lambda: next(told), process=lambda index: process, end=lambda working: (0, 1.0)
        )
        victim: Any = SimpleNamespace(processes=1, checkpoints=tmp_path, attempt=lambda number: nullcontext(job))
        return _wound(victim, 0, Fault(steps[0], kind), random.Random(0), disk)

    assert wound(60, 66) is None
    with pytest.raises(LmxError, match=f"{kind} of process 0 after step 31 went unnoticed: the run came to its end"):
        wound(31, 100)


def test_random_faults_are_as_many_as_asked_and_of_every_kind() -> None:
    faults = random_faults(50, 200, seed=1)
    assert faults == random_faults(50, 200, seed=1) != random_faults(50, 200, seed=2)
    assert Counter(replace(fault, step=0) for fault in faults) == dict.fromkeys(CYCLE, 5)
    assert {f.kind for f in CYCLE} == {"SIGKILL", "SIGTERM", "SIGSTOP", "SIGINT", "full disk"}
    assert {f.damage for f in CYCLE} == {"", "truncate", "flip"}
    assert {f.moment for f in CYCLE} == {"starting", "training", "saving"}
    steps = [f.step for f in faults]
    assert steps[0] >= FIRST
    assert sorted(set(steps)) == steps
    with pytest.raises(UserError, match="--faults 20, --steps 60: expected at least 1 fault and 71 steps"):
        random_faults(20, 60, seed=0)
