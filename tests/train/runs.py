"""What tests of whole runs look at."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lmx.checkpoint import manifest
from lmx.checkpoint.checkpointer import load_subtree
from lmx.experiment import Experiment, RunDir
from lmx.train.metrics import MetricsLog

TIMES = ("step_seconds", "tokens_per_second", "eval_seconds")
STEPS = 12


def metrics(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def learned(run: RunDir) -> list[dict[str, Any]]:
    """The metrics that do not depend on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(run)]


def arrays(run: RunDir, part: str, step: int = STEPS) -> list[bytes]:
    state = load_subtree(run.checkpoints, part, step=step).state
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def assert_same(run: RunDir, expected: RunDir) -> None:
    assert learned(run) == learned(expected)
    for part in ("params", "optimizer", "ema"):
        assert arrays(run, part) == arrays(expected, part)
    assert run.samples.read_text() == expected.samples.read_text()


def changed(experiment: Experiment, part: str, **values: Any) -> Experiment:
    return replace(experiment, **{part: replace(getattr(experiment, part), **values)})


def stop_after_logging(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A SIGTERM that comes when the metrics of ``step`` have been written: while the next one is computed."""
    write = MetricsLog.write

    def stopping(self: MetricsLog, at: int, values: Any) -> None:
        write(self, at, values)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", stopping)


def lose(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)


def truncate(checkpoint: Path) -> None:
    file = max((f for f in checkpoint.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def cut_off(checkpoint: Path) -> None:
    (checkpoint / manifest.FILE).unlink()
    (checkpoint.parent / "saving").write_text(f"{checkpoint.name}\n")
