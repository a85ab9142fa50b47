"""A tiny run that whole runs are compared with, and places for more of them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmx.checkpoint.config import CheckpointConfig
from lmx.data.config import DataConfig, LocalFiles, TrainedBpe
from lmx.experiment import EvalConfig, Experiment, RunDir, SampleConfig, TrainConfig
from lmx.models.families.llama import Llama
from lmx.optim.schedule import Schedule
from lmx.train import run as run_module
from lmx.train.run import train
from tests.train.runs import STEPS


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for index in range(40):
        words = rng.choice(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "by"], size=30)
        (directory / f"{index:02}.txt").write_text(" ".join(words))
    return directory


@pytest.fixture(scope="session")
def tiny(corpus: Path) -> Experiment:
    """Evaluates and saves every 4 steps; the batch is a multiple of the 8 devices."""
    sizes = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "hidden": 32}
    return Experiment(
        model=Llama(vocab=300, context=32, tied=True, **sizes),
        data=DataConfig((LocalFiles(files=(str(corpus),)),), TrainedBpe(vocab_size=300), held_out=0.2),
        schedule=Schedule(peak=1e-2, warmup=2),
        train=TrainConfig(steps=STEPS, batch=8, length=32, log_every=1, ema=0.5, remat="none"),
        eval=EvalConfig(every=4, rows=8),
        sample=SampleConfig(every=6, prompts=("the", "a"), tokens=3),
        checkpoint=CheckpointConfig(every=4, keep=3),
    )


@pytest.fixture(scope="session")
def finished(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, Any]]:
    """A run that nothing disturbed, and its summary."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    return RunDir(path), train(tiny, path)


@pytest.fixture
def copy(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A copy of the finished run to spoil; reports are drawn elsewhere."""
    monkeypatch.setattr(run_module, "_report", lambda run: {})
    shutil.copytree(finished[0].path, tmp_path / "copy")
    return RunDir(tmp_path / "copy")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(run_module, "_report", lambda run: {})
    return RunDir(tmp_path / "fresh")
