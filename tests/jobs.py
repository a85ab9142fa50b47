"""What the tests of jobs with several processes share: a tiny recipe, and how to read its run."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RECIPE = """
from lmx.checkpoint.config import CheckpointConfig
from lmx.data.config import DataConfig, LocalFiles, TrainedBpe
from lmx.experiment import EvalConfig, Experiment, TrainConfig
from lmx.models.families.llama import Llama
from lmx.optim.schedule import Schedule

SIZES = dict(layers=2, width=16, heads=2, kv_heads=2, head_dim=8, hidden=32)


def tiny() -> Experiment:
    return Experiment(
        model=Llama(vocab=300, context=32, tied=True, **SIZES),
        data=DataConfig((LocalFiles(files=("corpus",)),), TrainedBpe(vocab_size=300), held_out=0.2),
        schedule=Schedule(peak=1e-3, warmup=2),
        train=TrainConfig(steps=8, batch=8, length=32, log_every=1, remat="none"),
        eval=EvalConfig(rows=8),
        checkpoint=CheckpointConfig(every=4, keep=3),
    )
"""
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "by"]
TRAIN = (sys.executable, "-m", "lmx.cli.main", "train", "tiny.py")


def set_up(root: Path) -> None:
    """Writes the recipe and its corpus."""
    (root / "tiny.py").write_text(RECIPE)
    (root / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        (root / "corpus" / f"{index:02}.txt").write_text(" ".join(rng.choice(WORDS, size=30)))


def environment(devices: int, **more: str) -> dict[str, str]:
    """That of a process with so many virtual devices."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **more}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def both(directories: list[Path], *commands: tuple[str, ...], devices: int = 2) -> list[tuple[int, str]]:
    """The exit code and output of two processes that find each other by themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = []
    for index, command in enumerate(commands):
        place = {"LMX_COORDINATOR": address, "LMX_PROCESSES": "2", "LMX_PROCESS": str(index)}
        environ = environment(devices, **place, LMX_START_SECONDS="60", LMX_HEARTBEAT_SECONDS="20")
        output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=directories[index], env=environ, **output))
    outputs = [process.communicate(timeout=200)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]
