"""Where a run's time went: the share of its wall time, over all its attempts, in steps that count, and the rest named.

``goodput.jsonl`` is written by :mod:`lmx.train.ledger` as the run goes. A line holds how long its attempt had spent on
what so far, so the last line of an attempt tells all of it, and the lines before tell which steps the time made.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "goodput.jsonl"
STEPS = "steps"
PHASES = (STEPS, "start_up", "compile", "data_wait", "evaluation", "checkpoint", "finish")
"""What an attempt spends its time on, as it records it."""
KINDS = {
    STEPS: "steps",
    "repeated": "repeated steps",
    "start_up": "start-up",
    "compile": "compilation",
    "data_wait": "waiting for data",
    "evaluation": "evaluation and samples",
    "checkpoint": "waiting for checkpoints",
    "finish": "summary",
    "restart": "down between attempts",
}
"""All that wall time goes into: what is recorded; the steps that were lost and done again; what no attempt recorded."""


@dataclass(frozen=True)
class Goodput:
    """A run's wall time by kind.

    Attributes:
      seconds: for each of :data:`KINDS`; their sum is the wall time from the first start to the last record.
      attempts: how often the run was started.
    """

    seconds: dict[str, float]
    attempts: int

    @property
    def wall(self) -> float:
        """Seconds from the first start to the last record."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """The share of the wall time in steps that counted."""
        return self.seconds[STEPS] / self.wall if self.wall else 0.0

    def data(self) -> dict[str, Any]:
        """JSON-ready data: the share, the wall time, the attempts and the seconds by kind."""
        return {"share": self.share, "wall_seconds": self.wall, "attempts": self.attempts, "seconds": self.seconds}

    def sentence(self) -> str:
        """The share, and the rest from the largest on."""
        rest = sorted(((k, v) for k, v in self.seconds.items() if k != STEPS and v), key=lambda part: -part[1])
        named = ", ".join(f"{KINDS[k]} {v / self.wall:.1%}" for k, v in rest)
        starts = f" in {self.attempts} attempts" if self.attempts > 1 else ""
        return f"goodput {self.share:.1%} of {self.wall:,.0f} s{starts}{'; ' if named else ''}{named}"


@dataclass
class _Stretch:
    """Seconds that made the steps after ``first`` up to ``last``."""

    first: int
    last: int
    seconds: float

    def cut(self, step: int) -> float:
        """Keeps what was done up to ``step``; the seconds of the rest."""
        done = min(max((step - self.first) / (self.last - self.first), 0.0), 1.0)
        lost = self.seconds * (1 - done)
        self.last, self.seconds = max(self.first, min(self.last, step)), self.seconds * done
        return lost


def read_goodput(run: Path) -> Goodput | None:
    """What the run in this directory has recorded, or None if it has not trained yet."""
    file = run / FILE
    lines = list(_lines(file.read_text(encoding="utf-8", errors="replace"))) if file.exists() else []
    return account(lines) if lines else None


def account(lines: Sequence[dict[str, Any]]) -> Goodput:
    """Adds up the lines of all attempts.

    An attempt that goes on after step s gives up what earlier ones did after s: that time is "repeated". The time
    between the last line of an attempt and the start of the next is "restart".
    """
    seconds = dict.fromkeys(KINDS, 0.0)
    kept: list[_Stretch] = []
    ended: float | None = None
    attempts = [list(group) for _, group in itertools.groupby(lines, key=lambda line: line["began"])]
    for attempt in attempts:
        first, last = attempt[0], attempt[-1]
        seconds["restart"] += max(first["began"] - ended, 0.0) if ended is not None else 0.0
        ended = last["at"]
        seconds["repeated"] += sum(stretch.cut(first["start"]) for stretch in kept)
        kept = [stretch for stretch in kept if stretch.last > stretch.first]
        for phase in PHASES[1:]:
            seconds[phase] += last["seconds"].get(phase, 0.0)
        stretches, unfinished = _stretches(attempt)
        kept += stretches
        seconds[STEPS if attempt is attempts[-1] else "repeated"] += unfinished
    seconds[STEPS] += sum(stretch.seconds for stretch in kept)
    return Goodput(seconds, len(attempts))


def _stretches(attempt: Sequence[dict[str, Any]]) -> tuple[list[_Stretch], float]:
    """The stretches of an attempt, and the seconds of steps that were not finished at its last line."""
    stretches, step, spent = [], int(attempt[0]["start"]), 0.0
    for line in attempt:
        total = float(line["seconds"].get(STEPS, 0.0))
        if line["step"] > step:
            stretches.append(_Stretch(step, int(line["step"]), total - spent))
            step, spent = int(line["step"]), total
    return stretches, float(attempt[-1]["seconds"].get(STEPS, 0.0)) - spent


def _lines(text: str) -> Iterable[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError):  # a crash cut it off
            continue
