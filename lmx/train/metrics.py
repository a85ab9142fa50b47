"""What a run says of itself: metrics.jsonl and TensorBoard, read from the device one step late."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from lmx.experiment import RunDir
from lmx.files import json_text, write_durably
from lmx.sharding.processes import is_first
from lmx.train.appended import Appended, Scalars
from lmx.train.step import Metrics

Values = dict[str, float]


@dataclass
class StepClock:
    """Times steps by when their results exist, so that work queued on the device is not mistaken for work done."""

    tokens: int
    last: float = field(default_factory=time.perf_counter)
    waited: float = 0.0

    def restart(self) -> None:
        """What happened since the last step (an evaluation, a checkpoint) is not part of the next."""
        self.last, self.waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for the devices, and so for other processes."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def lap(self) -> tuple[float, float]:
        """Seconds since the last step's result or restart, and those of them that were not spent waiting."""
        now = time.perf_counter()
        seconds, waited = now - self.last, self.waited
        self.last, self.waited = now, 0.0
        return seconds, seconds - waited


@dataclass
class Recorder:
    """Reads each step's metrics when the next one is under way.

    ``push`` returns the values of the step before; ``flush`` those of the last.
    """

    clock: StepClock
    pending: tuple[int, Metrics] | None = None
    own_seconds: float = 0.0
    """Of the last step that was read: this process's own time, before it waited for the devices."""

    def wait(self) -> None:
        """Returns when the devices have nothing more to do."""
        if self.pending is not None:
            with self.clock.waiting():
                jax.block_until_ready(self.pending[1])

    def push(self, step: int, metrics: Metrics) -> tuple[int, Values] | None:
        """Takes the metrics of ``step`` (steps done), still being computed; gives back the previous ones."""
        ready = self.flush()
        self.pending = step, metrics
        return ready

    def flush(self) -> tuple[int, Values] | None:
        """Waits for the metrics that were pushed last."""
        if self.pending is None:
            return None
        (step, metrics), self.pending = self.pending, None
        with self.clock.waiting():
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds, self.own_seconds = self.clock.lap()
        return step, {**values, "step_seconds": seconds, "tokens_per_second": self.clock.tokens / seconds}


class MetricsLog:
    """Appends to metrics.jsonl and TensorBoard; opened at a step, it first drops what was written after that step.

    A number that is not finite is null in metrics.jsonl.

    Args:
      run: whose files they are.
      step: the last one that stays.
      unlogged: lines that an earlier attempt could not write, as :attr:`unlogged` had them.
    """

    def __init__(self, run: RunDir, step: int, unlogged: str = ""):
        kept = cut_back(run.metrics, step)
        cut_back(run.samples, step)
        cut_back(run.hosts, step)
        self._lines = Appended(run.metrics)
        self._board = Scalars(run.path / "tensorboard", step + 1)
        for line in unlogged.splitlines():
            if line not in kept:
                values = numbers(json.loads(line))
                self.write(int(values.pop("step")), values)

    def write(self, step: int, values: Values) -> None:
        """One line: the step and the values. Raises OSError if it could not be written; the next write tries again."""
        try:
            self._lines.add((json_text({"step": step, **values}) + "\n").encode())
        finally:
            self._board.add(step, values)

    @property
    def unlogged(self) -> str:
        """The lines that could not be written yet: a checkpoint keeps them."""
        return self._lines.left.decode()

    def close(self) -> None:
        """Closes both; raises OSError if something is still not written."""
        try:
            self._lines.close()
        finally:
            self._board.close()


class NoLog:
    """The log of all processes but the first."""

    unlogged = ""

    def write(self, step: int, values: Values) -> None:
        """Keeps nothing."""

    def close(self) -> None:
        """Has nothing to close."""


def open_log(run: RunDir, step: int, unlogged: str) -> MetricsLog | NoLog:
    """This process's log, from ``step`` on."""
    return MetricsLog(run, step, unlogged) if is_first() else NoLog()


def append_json(file: Path, *values: dict[str, Any]) -> None:
    """Adds a line for each value to a JSONL file, or nothing: then it raises OSError."""
    with closing(Appended(file)) as stream:
        stream.add("".join(json_text(value) + "\n" for value in values).encode())


def steps_of(file: Path) -> set[int]:
    """The steps that a JSONL file has lines of."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {json.loads(line)["step"] for line in lines}


def last_values(file: Path) -> Values:
    """The values of metrics.jsonl's last line, its step among them."""
    return numbers(json.loads(file.read_text(encoding="utf-8").splitlines()[-1]))


def numbers(values: dict[str, float | None]) -> Values:
    """Values as they were before they became JSON, where those that are not finite are null."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def cut_back(file: Path, step: int) -> list[str]:
    """Drops the lines of later steps, and a last line that a crash cut off; the rest, which it returns, is replaced at
    once."""
    if not file.exists():
        return []
    kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _belongs(line, step)]
    write_durably(file, "".join(line + "\n" for line in kept))
    return kept


def _belongs(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
