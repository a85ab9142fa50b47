"""Who is called slow, and what a slow reader of data looks like in a run of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmx.experiment import RunDir
from lmx.train import stragglers
from lmx.train.stragglers import Stragglers, Times

HOSTS = {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(
    ("own", "step", "expected"),
    [
        ({0: 0.01, 1: 0.20, 2: 0.02}, 0.25, "slowest process 1 (b): 0.200 s of its own, median 0.020"),
        ({0: 0.01, 1: 0.20}, 0.25, "slowest process 1 (b): 0.200 s of its own, median 0.010"),
        ({0: 0.10, 1: 0.12, 2: 0.14}, 0.25, ""),  # not 1.5 times the median
        ({0: 0.001, 1: 0.002, 2: 0.009}, 0.25, ""),  # not a tenth of a step
        ({0: 0.5}, 0.5, ""),
    ],
)
def test_only_a_process_that_is_far_behind_is_called_slow(own: dict[int, float], step: float, expected: str) -> None:
    assert Times(own, HOSTS, step).straggler() == expected


def test_times_are_told_and_heard_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {1: json.dumps(["b", 0.3])}
    monkeypatch.setattr(stragglers, "count", lambda: 2)
    monkeypatch.setattr(stragglers, "post", lambda topic, text: told.update({0: text}))
    monkeypatch.setattr(stragglers, "posted", lambda topic: told)
    collected = Stragglers(RunDir(tmp_path))
    assert collected.exchange(0.5) is None  # it has nothing to tell yet
    for own in (0.1, 0.2):
        collected.add(own)
    times = collected.exchange(0.5)
    assert times is not None
    collected.write(2, times)
    assert times.own_seconds == {0: pytest.approx(0.15), 1: 0.3}
    assert times.values() == {
        "slowest_process": 1,
        "slowest_own_seconds": 0.3,
        "median_own_seconds": pytest.approx(0.15),
    }
    line: dict[str, Any] = json.loads((tmp_path / "hosts.jsonl").read_text())
    assert next(iter(line["own_seconds"])) == "1 (b)"
    assert collected.own == []
