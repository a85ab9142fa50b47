"""Where a run's time went, added up from what its attempts recorded."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmx.report.goodput import KINDS, Goodput, account, read_goodput
from lmx.report.page import write_report


def line(began: float, at: float, start: int, step: int, **seconds: float) -> dict[str, Any]:
    return {"began": began, "at": at, "start": start, "step": step, "seconds": seconds}


KILLED_AND_RESUMED = [
    line(100, 110, 0, 0, start_up=10, steps=0),
    line(100, 118, 0, 0, start_up=10, compile=8, steps=0),
    line(100, 138, 0, 20, start_up=10, compile=8, steps=20),
    line(100, 140, 0, 20, start_up=10, compile=8, steps=20, checkpoint=2),
    line(100, 150, 0, 30, start_up=10, compile=8, steps=30, checkpoint=2),
    # killed after step 30 and 4 unrecorded seconds, started again 6 seconds later, from the checkpoint of step 20
    line(160, 165, 20, 20, start_up=5, steps=0),
    line(160, 167, 20, 20, start_up=5, compile=2, steps=0),
    line(160, 187, 20, 40, start_up=5, compile=2, steps=19, data_wait=1),
]


def test_steps_that_were_lost_are_repeated_ones_and_every_second_has_a_name() -> None:
    found = account(KILLED_AND_RESUMED)
    assert found.attempts == 2
    assert found.wall == 187 - 100
    assert {k: v for k, v in found.seconds.items() if v} == {
        "steps": 20 + 19,
        "repeated": 10,
        "start_up": 15,
        "compile": 10,
        "data_wait": 1,
        "checkpoint": 2,
        "restart": 10,
    }
    assert found.share == pytest.approx(39 / 87)
    assert found.sentence() == (
        "goodput 44.8% of 87 s in 2 attempts; start-up 17.2%, repeated steps 11.5%, compilation 11.5%, "
        "down between attempts 11.5%, waiting for checkpoints 2.3%, waiting for data 1.1%"
    )


def test_a_resume_from_an_older_checkpoint_gives_up_more_and_never_twice() -> None:
    again = [line(190, 191, 10, 10, start_up=1, steps=0), line(190, 221, 10, 40, start_up=1, steps=30)]
    found = account([*KILLED_AND_RESUMED, *again])
    assert found.seconds["steps"] == 10 + 30
    assert found.seconds["repeated"] == 10 + 10 + 19
    assert found.wall == 221 - 100


def test_steps_that_nobody_finished_are_lost(tmp_path: Path) -> None:
    first = [line(0, 0, 0, 0, steps=0), line(0, 4, 0, 2, steps=4), line(0, 6, 0, 2, steps=6)]
    lines = [*first, line(9, 10, 2, 2, steps=1)]
    found = account(lines)
    assert (found.seconds["repeated"], found.seconds["steps"], found.wall) == (2, 5, 10)
    text = "".join(json.dumps(value) + "\n" for value in lines)
    (tmp_path / "goodput.jsonl").write_text(text + '{"began": 9, "at"')
    assert read_goodput(tmp_path) == account(lines)
    assert read_goodput(tmp_path / "nowhere") is None


def test_a_page_shows_the_shares_and_the_processes(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}')
    (tmp_path / "goodput.jsonl").write_text("".join(json.dumps(value) + "\n" for value in KILLED_AND_RESUMED))
    own = {"1 (<far>)": 0.3, "0 (near)": 0.1}
    (tmp_path / "hosts.jsonl").write_text(json.dumps({"step": 1, "step_seconds": 0.6, "own_seconds": own}))
    page = write_report([tmp_path]).read_text()
    for part in (
        "44.8% of 87 s",
        "down between attempts 11.5%",
        "2 attempts",
        "process 1 (&lt;far&gt;)",
        "0.3000",
        "50%",
    ):
        assert part in page
    assert page.index("process 1") < page.index("process 0")


def test_every_kind_is_named() -> None:
    full = Goodput(dict.fromkeys(KINDS, 1.0), 1)
    assert all(name in full.sentence() for kind, name in KINDS.items() if kind != "steps")
    assert full.data()["share"] == pytest.approx(1 / len(KINDS))
