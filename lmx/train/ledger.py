"""Keeps account of a run's time as it goes: what lmx.report.goodput adds up survives a kill."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from lmx.report.goodput import FILE, PHASES, STEPS
from lmx.train.appended import Appended

LEAST, PART = 1.0, 0.01
"""Seconds between two lines: so many, or this part of the attempt's age, so that a long run has few lines."""


class Ledger:
    """One attempt's time, each moment of it in one of the phases; nothing is written before training begins.

    Args:
      run: the run's directory; None keeps the account without writing it.
      began: when the attempt began, in seconds since 1970; now by default.
      clock: tells the time.
    """

    def __init__(self, run: Path | None, began: float | None = None, clock: Callable[[], float] = time.time):
        self._path, self._clock = run and run / FILE, clock
        self._began = self._since = clock() if began is None else began
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._start, self._step = "start_up", 0, 0
        self._file: Appended | None = None
        self._written = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within the block the time goes to this phase; after it again to the one before."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, name: str) -> str:
        """From now on the time goes to this phase; returns the one before."""
        now = self._clock()
        self._seconds[self._phase] += max(now - self._since, 0.0)  # a clock may be set back
        self._since, before, self._phase = now, self._phase, name
        return before

    def train(self, step: int) -> None:
        """Training goes on after ``step``: the first line of the attempt."""
        self._start = self._step = step
        self.enter(STEPS)
        if self._path:
            self._file = Appended(self._path)
        self.note(step, now=True)

    def note(self, step: int, *, now: bool = False) -> None:
        """``step`` is done; writes a line if it is time for one, or ``now``."""
        self._step = step
        self.enter(self._phase)
        age = self._since - self._began
        if self._file and (now or self._since - self._written >= max(LEAST, PART * age)):
            self._write()

    def close(self) -> None:
        """Writes the last line; where that fails, a part of the time since the line before is not told."""
        if self._file:
            with suppress(OSError), closing(self._file):
                self.note(self._step, now=True)
            self._file = None

    def _write(self) -> None:
        assert self._file is not None
        line = {"began": self._began, "at": self._since, "start": self._start, "step": self._step}
        rounded = {name: round(value, 4) for name, value in self._seconds.items()}
        self._file.add((json.dumps({**line, "seconds": rounded}) + "\n").encode())
        self._written = self._since


def process_began() -> float:
    """When this process began, in seconds since 1970; now where the system does not tell."""
    stat, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not (stat.exists() and uptime.exists()):
        return time.time()
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    age = float(uptime.read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
