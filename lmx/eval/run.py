"""Runs tasks, and tells their results to people and as JSON."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.eval.metrics.measure import Measure
from lmx.eval.tasks.task import Examinee, Prompted, Task, described

LIBRARIES = ("lmx", "jax", "sacrebleu", "rouge-score", "lm-eval")


@dataclass(frozen=True)
class Result:
    """What a model reached in one task.

    Attributes:
      n: examples that were measured.
      measures: by name.
      configuration: the task's.
      notes: what else is to be told: signatures, definitions.
      truncated: examples that lost a part of their context.
      dropped: examples that were too long and left out.
    """

    n: int
    measures: Mapping[str, Measure]
    configuration: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    truncated: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Changes:
    """What replaces the tasks' own settings; None leaves them."""

    files: tuple[str, ...] = ()
    limit: int | None = None
    shots: int | None = None
    seed: int | None = None

    def applied(self, task: Task) -> Task:
        """The task with these settings.

        Raises:
          UserError: shots or a seed, for a task without prompts.
        """
        own: dict[str, Any] = {"files": self.files} if self.files else {}
        own |= {} if self.limit is None else {"limit": self.limit}
        prompted = {name: getattr(self, name) for name in ("shots", "seed") if getattr(self, name) is not None}
        if prompted and not isinstance(task, Prompted):
            raise UserError(f"a {type(task).__name__} task has no prompts, so it takes no {' or '.join(prompted)}")
        return replace(task, **own, **prompted)


def run_tasks(model: Model, tasks: Mapping[str, Task], *, batch: int = 8) -> dict[str, Result]:
    """The result of each task, by its name.

    ``batch`` is how many rows are read at once; it changes no number beyond rounding.

    Raises:
      UserError: a task that does not fit the model, named; see :meth:`Task.run`.
    """
    examinee, results = Examinee(model, batch), {}
    for name, task in tasks.items():
        try:
            found = task.run(examinee)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        results[name] = Result(
            found.n, found.measures, described(task), dict(found.notes), found.truncated, found.dropped
        )
    return results


def as_data(
    model: str, step: int, results: Mapping[str, Result], command: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The results as JSON-ready data, with what they were made by; numbers that are not finite become None."""
    tasks = {name: asdict(result) for name, result in results.items()}
    for task in tasks.values():
        for measure in task["measures"].values():
            measure |= {key: finite(measure[key]) for key in ("value", "stderr")}
    return {
        "model": model,
        "step": step,
        "command": list(command),
        "configuration": dict(settings),
        "versions": {name: v for name in LIBRARIES if (v := _version(name))},
        "tasks": tasks,
    }


def finite(number: float | None) -> float | None:
    """The number, None where it is none."""
    return number if number is not None and math.isfinite(number) else None


def table(results: Mapping[str, Result]) -> str:
    """The results for people: a line for each measure, then what is to be told of each task."""
    rows = [("task", "measure", "value", "+-", "n")]
    for name, result in results.items():
        for measure, found in result.measures.items():
            error = "" if found.stderr is None else f"{found.stderr:.4f}"
            rows.append((name, measure, f"{found.value:.4f}", error, f"{found.n:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 8), *lines[1:], *_remarks(results)])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]


def _remarks(results: Mapping[str, Result]) -> list[str]:
    methods = {m.method for result in results.values() for m in result.measures.values() if m.stderr is not None}
    lines = [f"+- is the standard error: {'; '.join(sorted(methods))}"] if methods else []
    for name, result in results.items():
        notes = [f"{key}: {note}" for key, note in result.notes.items()]
        if result.truncated or result.dropped:
            notes.append(f"too long for the context: {result.truncated} truncated, {result.dropped} dropped")
        lines += [f"{name}: {note}" for note in notes]
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
