"""Which process holds the others up: each one's own time for a step, gathered without waiting.

All processes of a synchronous program have the same step time. What differs is how much of it each one spends before it
is ready: waiting for its data, dispatching, logging, being swapped out. The rest of the step it waits for the devices,
and so for the others. A device that computes slowly itself does not show here, only what keeps its host busy: a
profile (``--profile``) of two processes tells the two apart.
"""

import json
import socket
import statistics
from dataclasses import dataclass, field
from typing import Any

from lmx.experiment import RunDir
from lmx.sharding.processes import count, is_first, post, posted
from lmx.train.metrics import Values, append_json

TOPIC = "own-time"
SLOWER = 1.5
"""A process is called slow when its own time is more than so many times the median's ..."""
PART = 0.1
"""... and more than this part of a step beyond it."""
SHOWN = 8
"""The slowest processes that hosts.jsonl keeps of each time."""


@dataclass(frozen=True)
class Times:
    """What the processes told last.

    Attributes:
      own_seconds: of a step, by process.
      hosts: their names, by process.
      step_seconds: of the process that asks.
    """

    own_seconds: dict[int, float]
    hosts: dict[int, str]
    step_seconds: float

    @property
    def slowest(self) -> int:
        """The process with the most time of its own."""
        return max(self.own_seconds, key=lambda process: self.own_seconds[process])

    @property
    def median(self) -> float:
        """Seconds; of two processes the faster one's."""
        return statistics.median_low(self.own_seconds.values())

    def straggler(self) -> str:
        """The slow process in words, or nothing if none is slow."""
        own, usual = self.own_seconds[self.slowest], self.median
        if own <= SLOWER * usual or own - usual <= PART * self.step_seconds:
            return ""
        return (
            f"slowest process {self.slowest} ({self.hosts[self.slowest]}): {own:.3f} s of its own, median {usual:.3f}"
        )

    def values(self) -> Values:
        """The same for metrics.jsonl."""
        own = self.own_seconds[self.slowest]
        return {"slowest_process": self.slowest, "slowest_own_seconds": own, "median_own_seconds": self.median}

    def data(self) -> dict[str, Any]:
        """The slowest, for hosts.jsonl."""
        ranked = sorted(self.own_seconds, key=lambda process: -self.own_seconds[process])[:SHOWN]
        named = {f"{process} ({self.hosts[process]})": self.own_seconds[process] for process in ranked}
        return {"step_seconds": self.step_seconds, "median": self.median, "own_seconds": named}


@dataclass
class Stragglers:
    """Collects this process's own times, and at each log interval tells them and hears those of the others.

    Telling overwrites one value of the coordination service and hearing reads what is there: nobody waits, and the
    others' times may be those of the interval before.
    """

    run: RunDir
    own: list[float] = field(default_factory=list)

    def add(self, own_seconds: float) -> None:
        """A step's own time of this process."""
        self.own.append(own_seconds)

    def exchange(self, step_seconds: float) -> Times | None:
        """Tells the mean since the last time; on the first process of several, what all have told."""
        if count() == 1 or not self.own:
            return None
        post(TOPIC, json.dumps([socket.gethostname(), statistics.fmean(self.own)]))
        self.own.clear()
        if not is_first():
            return None
        told = {process: json.loads(text) for process, text in posted(TOPIC).items()}
        own, hosts = {p: float(t[1]) for p, t in told.items()}, {p: str(t[0]) for p, t in told.items()}
        return Times(own, hosts, step_seconds)

    def write(self, step: int, times: Times) -> None:
        """Adds them to hosts.jsonl."""
        append_json(self.run.hosts, {"step": step, **times.data()})
