"""The run that the check of faults kills: a tiny recipe on its own corpus, trained by the real command."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lmx
from lmx.errors import LmxError
from lmx.experiment import RunDir

EVERY = 10
"""Steps between checkpoints."""
PATIENCE = 300.0
"""Seconds without a new step after which the check gives up."""
TAIL = 4000
"""Bytes of a log's end."""
RECIPE = f'''"""The run that lmx check faults kills."""

from lmx.checkpoint.config import CheckpointConfig
from lmx.data.config import DataConfig, LocalFiles, TrainedBpe
from lmx.experiment import EvalConfig, Experiment, TrainConfig
from lmx.models.families.llama import Llama
from lmx.optim.schedule import Schedule

SIZES = dict(layers=2, width=128, heads=4, kv_heads=2, head_dim=32, hidden=320, tied=True)


def victim() -> Experiment:
    """Tiny, but with all that must survive: a mixture, several epochs, an average, evaluations."""
    return Experiment(
        model=Llama(vocab=512, context=128, **SIZES),
        data=DataConfig(
            sources=(LocalFiles(files=("one",), weight=3.0), LocalFiles(files=("two",))),
            tokenizer=TrainedBpe(vocab_size=512),
            held_out=0.1,
        ),
        schedule=Schedule(peak=2e-3, warmup=20),
        train=TrainConfig(batch=8, length=128, log_every=1, ema=0.9),
        eval=EvalConfig(every={5 * EVERY}, rows=8),
        checkpoint=CheckpointConfig(every={EVERY}, keep=3),
    )
'''
WORDS = "a ab be can do each for go has in it just keep let me no of on put quite run see to up very was you"


@dataclass(frozen=True)
class Attempt:
    """One process of a run: its log, and what the log says."""

    process: subprocess.Popen[bytes]
    log: Path

    def step(self) -> int:
        """The last step that it has logged; 0 before the first."""
        return _last(self.tail(), r"^step (\d+)/")

    def wait_for(self, ready: Callable[[], bool], what: str) -> None:
        """Returns as soon as ``ready``; raises LmxError if the process ends first, or nothing moves."""
        step, since = -1, time.monotonic()
        while not ready():
            if self.process.poll() is not None:
                code = self.process.returncode
                raise LmxError(f"the run ended with exit code {code} before {what}: {self.tail()}")
            if (now := self.step()) != step:
                step, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise LmxError(f"the run stands still at step {step}, before {what}: {self.tail()}")
            time.sleep(0.005)

    def wait(self) -> int:
        """The exit code, once it has one."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise LmxError(f"the run does not end: {self.tail()}") from error

    def tail(self) -> str:
        """The end of its log."""
        with self.log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            return file.read().decode(errors="replace").strip()


@dataclass(frozen=True)
class Victim:
    """A run of :data:`RECIPE` below ``root``, started again as often as needed."""

    root: Path
    name: str
    steps: int

    @property
    def run(self) -> RunDir:
        """Where it is kept."""
        return RunDir(self.root / self.name)

    @contextmanager
    def attempt(self, number: int) -> Iterator[Attempt]:
        """A process that trains; it does not outlive the block."""
        log = self.log(number)
        command = [sys.executable, "-m", "lmx.cli.main", "train", "victim.py"]
        command += ["--run-dir", self.name, "--train.steps", str(self.steps)]
        with log.open("wb") as file:
            # In a session of its own, so that Ctrl-C for the check does not reach it.
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=_environment(self.root),
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            yield Attempt(process, log)
        finally:
            process.kill()
            process.wait()

    def log(self, number: int) -> Path:
        """What an attempt wrote, by its number from 0."""
        return self.root / f"{self.name}_{number}.log"

    def resumed(self, number: int) -> int:
        """The step after which an attempt went on; 0 if it began anew."""
        return _last(self.log(number).read_text(encoding="utf-8"), r"^going on after step (\d+)")


def set_up(root: Path, seed: int) -> None:
    """Writes the recipe and its two sources."""
    (root / "victim.py").write_text(RECIPE, encoding="utf-8")
    rng = random.Random(seed)
    for source, documents in (("one", 240), ("two", 60)):
        (root / source).mkdir()
        for index in range(documents):
            text = " ".join(rng.choices(WORDS.split(), k=rng.randrange(20, 400)))
            (root / source / f"{index:03}.txt").write_text(text, encoding="utf-8")


def _environment(root: Path) -> dict[str, str]:
    """One CPU device, and no cache but the check's own."""
    packages = str(Path(lmx.__file__).parents[1])
    path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "LMX_CACHE": str(root / "cache"),
        "PYTHONPATH": path,
    }


def _last(text: str, pattern: str) -> int:
    found = re.findall(pattern, text, re.MULTILINE)
    return int(found[-1]) if found else 0
