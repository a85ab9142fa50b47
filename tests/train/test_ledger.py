"""The account of an attempt's time, with a clock of the test's own."""

import json
import time
from pathlib import Path

from lmx.report.goodput import FILE, read_goodput
from lmx.train.ledger import Ledger, process_began


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_every_second_goes_to_one_phase_and_survives_without_a_close(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path, began=990, clock=clock)
    assert not (tmp_path / FILE).exists()  # nothing was trained yet
    ledger.train(5)
    with ledger.phase("compile"):
        clock.now += 3
    for step in range(6, 10):
        clock.now += 2
        with ledger.phase("data_wait"):
            clock.now += 0.5
        ledger.note(step)
    found = read_goodput(tmp_path)  # as if killed here
    assert found is not None
    assert found.wall == clock.now - 990
    assert (found.seconds["start_up"], found.seconds["compile"], found.seconds["data_wait"]) == (10, 3, 2)
    assert found.seconds["steps"] == 8


def test_a_long_attempt_writes_few_lines(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path, clock=clock)
    ledger.train(0)
    for step in range(100_000):
        clock.now += 0.5
        ledger.note(step + 1)
    lines = (tmp_path / FILE).read_text().splitlines()
    assert len(lines) < 800
    assert clock.now - json.loads(lines[-1])["at"] < 0.02 * 50_000


def test_a_clock_that_is_set_back_takes_no_time_away(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path, clock=clock)
    ledger.train(0)
    clock.now -= 50
    ledger.note(1, now=True)
    found = read_goodput(tmp_path)
    assert found is not None
    assert min(found.seconds.values()) == 0


def test_a_process_knows_when_it_began() -> None:
    assert 0 < time.time() - process_began() < 24 * 3600
