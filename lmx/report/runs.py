"""A run directory as the report reads it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmx.errors import UserError
from lmx.report.goodput import Goodput, read_goodput

METRICS, SAMPLES, HOSTS = "metrics.jsonl", "samples.jsonl", "hosts.jsonl"


@dataclass(frozen=True)
class Series:
    """One number through training."""

    steps: np.ndarray
    """[points] int, rising."""
    values: np.ndarray
    """[points] float; not a number where the run logged none."""


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote during training."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Run:
    """What one run left behind; whatever it did not write is empty."""

    name: str
    series: dict[str, Series]
    configuration: dict[str, Any]
    data: dict[str, Any]
    summary: dict[str, Any]
    fingerprint: dict[str, Any]
    samples: tuple[Sample, ...]
    goodput: Goodput | None = None
    hosts: tuple[dict[str, Any], ...] = ()
    """Of several processes, the lines of hosts.jsonl."""


def read_run(directory: Path) -> Run:
    """Reads a run directory, of which only ``metrics.jsonl`` must be there.

    Raises:
      UserError: it is no run directory, nothing was logged in it, or one of its files is damaged.
    """
    if not (directory / METRICS).is_file():
        raise UserError(f"{directory} has no {METRICS}; name the directory of a run that logged at least one step")
    series = _series(tuple(_lines(directory / METRICS)))
    if not series:
        raise UserError(f"{directory / METRICS} has no logged step yet; wait for the run's first one")
    samples = (Sample(int(s["step"]), str(s["prompt"]), str(s["text"])) for s in _lines(directory / SAMPLES))
    return Run(
        name=directory.resolve().name,
        series=series,
        configuration=_object(directory / "experiment.json"),
        data=_object(directory / "data.json"),
        summary=_object(directory / "summary.json"),
        fingerprint=_object(directory / "fingerprint.json"),
        samples=tuple(samples),
        goodput=read_goodput(directory),
        hosts=tuple(_lines(directory / HOSTS)),
    )


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a crash may have cut off the last one, which is then left out."""
    if not file.exists():
        return
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"line {number} of {file} is not a JSON object: {line[:60]!r}") from error


def _series(rows: tuple[dict[str, Any], ...]) -> dict[str, Series]:
    merged: dict[int, dict[str, float]] = {}
    for row in rows:
        numbers = {k: float("nan" if v is None else v) for k, v in row.items() if _is_number(v)}
        if "step" in numbers:
            merged.setdefault(int(numbers.pop("step")), {}).update(numbers)
    found: dict[str, list[tuple[int, float]]] = {}
    for step in sorted(merged):
        for key, value in merged[step].items():
            found.setdefault(key, []).append((step, value))
    return {k: Series(*map(np.array, zip(*points, strict=True))) for k, points in found.items()}


def _is_number(value: Any) -> bool:
    """Whether a value of metrics.jsonl is one; null stands for one that is not finite."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _object(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is not a JSON object: {error}; delete it to report on the rest") from error
