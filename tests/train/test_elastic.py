"""A run that goes on with other numbers of devices and processes: one loss curve, and each document once an epoch."""

import contextlib
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jobs import WORDS, both, metrics

from lmx.cli.recipes import load_recipe
from lmx.data.prepare import prepare
from lmx.errors import Interrupted
from lmx.experiment import Experiment, RunDir
from lmx.sharding.mesh import build_mesh
from lmx.train import loop as loop_module
from lmx.train import run as run_module
from lmx.train.run import train

STEPS, BATCH = 24, 8
RECIPE = '''
import json
import os
import signal
import sys

import numpy as np

from lmx.checkpoint.config import CheckpointConfig
from lmx.data.config import DataConfig, LocalFiles, TrainedBpe
from lmx.experiment import EvalConfig, Experiment, TrainConfig
from lmx.models.families.llama import Llama
from lmx.optim.schedule import Schedule
from lmx.train import loop

SIZES = dict(layers=2, width=16, heads=2, kv_heads=2, head_dim=8, hidden=32)


def mixed() -> Experiment:
    return Experiment(
        model=Llama(vocab=300, context=64, tied=True, **SIZES),
        data=DataConfig(
            (LocalFiles(files=("a",), weight=2.0), LocalFiles(files=("b",))), TrainedBpe(vocab_size=300), held_out=0.1
        ),
        schedule=Schedule(peak=1e-2, warmup=2),
        train=TrainConfig(steps=24, batch=8, length=64, log_every=1, remat="none"),
        eval=EvalConfig(rows=8),
        checkpoint=CheckpointConfig(every=100, keep=3),
    )


class Recorded(loop.Loader):
    """Writes the rows that this process was given, and asks the run to stop where it is told to."""

    def __init__(self, *arguments, start_step, **more):
        super().__init__(*arguments, start_step=start_step, **more)
        self.step = start_step

    def __next__(self):
        batch = super().__next__()
        with open("rows.jsonl", "a") as file:
            for shard in zip(*(batch[key].addressable_shards for key in ("tokens", "segment_ids"))):
                first = shard[0].index[0].indices(8)[0] + 8 * self.step
                for i, (tokens, segments) in enumerate(zip(*(np.asarray(part.data).tolist() for part in shard))):
                    file.write(json.dumps([first + i, tokens, segments]) + "\\n")
        self.step += 1
        if self.step == int(os.environ.get("STOP_AFTER", 0)) and os.environ.get("LMX_PROCESS", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return batch


loop.Loader = Recorded
'''


def set_up(root: Path) -> None:
    """Two sources, whose documents begin with a name of their own and are shorter than a row."""
    rng = np.random.default_rng(0)
    for source, count in (("a", 40), ("b", 30)):
        (root / source).mkdir()
        for index in range(count):
            words = " ".join(rng.choice(WORDS, size=rng.integers(3, 10)))
            (root / source / f"{index:02}.txt").write_text(f"{source}{index:02}: {words}")
    (root / "mixed.py").write_text(RECIPE)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    set_up(tmp_path)
    monkeypatch.setattr(run_module, "_report", lambda run: {})
    monkeypatch.setattr(loop_module, "Loader", loop_module.Loader)  # which the recipe replaces
    with contextlib.chdir(tmp_path):
        yield tmp_path


def train_on(devices: int, run: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains in this process, on some of its devices, until it is told to stop."""
    monkeypatch.setenv("STOP_AFTER", str(stop_after))
    mesh: Callable[..., Any] = functools.partial(build_mesh, devices=jax.devices()[:devices])
    monkeypatch.setattr(run_module, "build_mesh", mesh)
    with pytest.raises(Interrupted) if stop_after else contextlib.nullcontext():
        train(mixed(), run)


def mixed() -> Experiment:
    loop_module.Loader = next(c for c in loop_module.Loader.__mro__ if c.__module__ == "lmx.data.loader")  # type: ignore
    return load_recipe("mixed.py")


def assert_same_curve(run: Path, calm: Path) -> None:
    found, expected = metrics(run), metrics(calm)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for line, other in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4), line["step"]
    assert found[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], rel=1e-4)


def assert_every_document_once_an_epoch(root: Path, run: Path) -> None:
    """From the tokens that the steps were given, and the texts: nothing of the loader's own account."""
    tokenizer = prepare(mixed().corpus).tokenizer
    lines = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    rows = {index: (tokens, segments) for index, tokens, segments in lines}
    assert sorted(rows) == list(range(STEPS * BATCH))
    seen: dict[str, list[str]] = {"a": [], "b": []}
    for index in sorted(rows):
        tokens, segments = (np.array(part) for part in rows[index])
        for segment in range(1, segments.max() + 1):
            name = re.findall(r"([ab])(\d\d):", tokenizer.decode(tokens[segments == segment].tolist()))
            assert len(name) == 1
            seen[name[0][0]].append("".join(name[0]))
    for source, names in seen.items():
        documents = set(names)
        assert 0.7 * len(list((root / source).iterdir())) < len(documents)
        epochs = [names[i : i + len(documents)] for i in range(0, len(names), len(documents))]
        assert len(epochs) > 2
        assert all(set(epoch) == documents for epoch in epochs[:-1]), source
        assert len(set(epochs[-1])) == len(epochs[-1])


def test_a_run_goes_from_8_to_4_to_1_devices(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_on(8, root / "calm", 0, monkeypatch)
    (root / "rows.jsonl").unlink()
    for devices, stop in ((8, 7), (4, 15), (1, 0)):
        train_on(devices, root / "run", stop, monkeypatch)
    assert_same_curve(root / "run", root / "calm")
    assert_every_document_once_an_epoch(root, root / "run")
    assert RunDir(root / "run").load_experiment() == mixed()


@pytest.mark.slow
def test_a_run_goes_from_8_to_4_to_2_times_4_to_1_devices(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_on(8, root / "calm", 0, monkeypatch)
    (root / "rows.jsonl").unlink()
    for devices, stop in ((8, 6), (4, 12)):
        train_on(devices, root / "run", stop, monkeypatch)
    command = (sys.executable, "-m", "lmx.cli.main", "train", "mixed.py", "--run-dir", "run")
    monkeypatch.setenv("STOP_AFTER", "18")
    for code, output in both([root, root], command, command, devices=4):
        assert code == 75, output
    train_on(1, root / "run", 0, monkeypatch)
    assert_same_curve(root / "run", root / "calm")
    assert_every_document_once_an_epoch(root, root / "run")
