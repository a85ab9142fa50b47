"""The run that the check of faults disturbs: a tiny recipe on its own corpus, trained by the real command."""

import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import lmx
from lmx.errors import LmxError
from lmx.experiment import RunDir
from lmx.sharding.launchers import free_port, place_variables
from lmx.train.supervise import Child, Command, Limits, Supervisor

EVERY = 10
"""Steps between checkpoints."""
DISK = "disk"
"""The directory below the root in which the runs have their checkpoints."""
START, HEARTBEAT = 240.0, 15.0
"""Seconds that processes have to find each other, and of silence after which one counts as hung."""
PATIENCE = 300.0
"""Seconds without a new step after which the check gives up."""
TAIL = 4000
"""Bytes of a log's end."""
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
"""Flags of XLA with which it compiles in the least time."""
if version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # newer compilers do not know it
RECIPE = f'''"""The run that lmx check faults disturbs."""

from pathlib import Path

from lmx.checkpoint.config import CheckpointConfig
from lmx.data.config import DataConfig, LocalFiles, TrainedBpe
from lmx.experiment import EvalConfig, Experiment, TrainConfig
from lmx.models.families.llama import Llama
from lmx.optim.schedule import Schedule
from lmx.sharding.mesh import MeshConfig

HERE = Path(__file__).parent
SIZES = dict(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, hidden=160, tied=True)


def victim() -> Experiment:
    """Tiny, but with all that must survive: a mixture, several epochs, an average, evaluations."""
    return Experiment(
        model=Llama(vocab=300, context=64, **SIZES),
        data=DataConfig(
            sources=(LocalFiles(files=(str(HERE / "one"),), weight=3.0), LocalFiles(files=(str(HERE / "two"),))),
            tokenizer=TrainedBpe(vocab_size=300),
            held_out=0.1,
        ),
        schedule=Schedule(peak=2e-3, warmup=10),
        train=TrainConfig(batch=8, length=64, log_every=1, ema=0.9),
        eval=EvalConfig(every={5 * EVERY}, rows=8),
        checkpoint=CheckpointConfig(every={EVERY}, keep=3),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
'''
WORDS = "a ab be can do each for go has in it just keep let me no of on put quite run see to up very was you"


@dataclass(frozen=True)
class Attempt:
    """The processes of one attempt at a run, under a supervisor: what they log, and the status they come to."""

    supervisor: Supervisor
    status: "Future[int]"
    log: Path

    def step(self) -> int:
        """The last step that was logged; 0 before the first."""
        return _last(self.tail(), r"^\[process 0\] step (\d+)/") or 0

    def finished(self) -> bool:
        """Whether the job has ended by itself, its steps done."""
        return self.status.done() and self.status.result() == 0

    def process(self, index: int) -> Child:
        """One of its processes."""
        return self.supervisor.children[index]

    def wait_for(self, ready: Callable[[], bool], what: str) -> None:
        """Returns as soon as ``ready``; raises LmxError if the job ends first, or nothing moves."""
        step, since = -1, time.monotonic()
        while not ready():
            if self.status.done() and not ready():
                raise LmxError(f"the run ended with exit code {self.status.result()} before {what}: {self.tail()}")
            if (now := self.step()) != step:
                step, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise LmxError(f"the run stands still at step {step}, before {what}: {self.tail()}")
            time.sleep(0.02)

    def end(self, *, working: bool = False) -> tuple[int, float]:
        """The job's exit code, and the seconds until it had one: from now, or, if it may still work, from its last
        step."""
        step, since = self.step(), time.monotonic()
        while not self.status.done():
            if working and (now := self.step()) != step:
                step, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise LmxError(f"the run does not end: {self.tail()}")
            time.sleep(0.02)
        return self.status.result(), time.monotonic() - since

    def tail(self) -> str:
        """The end of the log."""
        with self.log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            return file.read().decode(errors="replace").strip()


@dataclass(frozen=True)
class Victim:
    """A run of :data:`RECIPE` below ``root``, started again as often as needed, by so many processes."""

    root: Path
    name: str
    steps: int
    processes: int = 1

    @property
    def run(self) -> RunDir:
        """Where it is kept."""
        return RunDir(self.root / self.name)

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie: on the disk that can be made full."""
        return self.root / DISK / self.name

    @contextmanager
    def attempt(self, number: int) -> Iterator[Attempt]:
        """Processes that train; they do not outlive the block."""
        limits = Limits(0, START, HEARTBEAT)
        with ThreadPoolExecutor(1) as pool, self.log(number).open("wb", buffering=0) as file:
            supervisor = Supervisor(limits, lambda text: None, file)
            status = pool.submit(supervisor.attempts, self._commands)
            try:
                while not supervisor.children and not status.done():
                    time.sleep(0.005)
                yield Attempt(supervisor, status, self.log(number))
            finally:
                supervisor.end()

    def log(self, number: int) -> Path:
        """What an attempt wrote, by its number from 0."""
        return self.root / f"{self.name}_{number}.log"

    def resumed(self, number: int) -> int:
        """The step after which an attempt went on, or the next one that came so far; 0 if it began anew."""
        for later in range(number, number + 100):
            if not self.log(later).exists():
                break
            text = self.log(later).read_text(encoding="utf-8", errors="replace")
            step = _last(text, r"^\[process 0\] going on after step (\d+)")
            if step is not None or _last(text, r"^\[process 0\] step (\d+)/") is not None:
                return step or 0
        raise LmxError(f"no attempt at {self.name} went on after attempt {number}")

    def _commands(self) -> list[Command]:
        words = [sys.executable, "-m", "lmx.cli.main", "train", str(self.root / "victim.py")]
        words += ["--run-dir", str(self.run.path), "--train.steps", str(self.steps)]
        words += ["--checkpoint.directory", str(self.checkpoints)]
        address = f"127.0.0.1:{free_port()}"
        return [Command(words, self._environment(address, i), f"process {i}") for i in range(self.processes)]

    def _environment(self, address: str, index: int) -> dict[str, str]:
        """One CPU device, and no cache but the check's own."""
        packages = str(Path(lmx.__file__).parents[1])
        path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
        place = place_variables(address, self.processes, index) if self.processes > 1 else {"LMX_PROCESSES": "1"}
        return {
            **os.environ,
            **place,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {QUICK}",
            "LMX_CACHE": str(self.root / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(self.root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": path,
            "LMX_START_SECONDS": str(int(START)),
            "LMX_HEARTBEAT_SECONDS": str(int(HEARTBEAT)),
            "PYTHONUNBUFFERED": "1",
        }


def set_up(root: Path, seed: int) -> None:
    """Writes the recipe and its two sources."""
    (root / "victim.py").write_text(RECIPE, encoding="utf-8")
    rng = random.Random(seed)
    for source, documents in (("one", 120), ("two", 30)):
        (root / source).mkdir()
        for index in range(documents):
            text = " ".join(rng.choices(WORDS.split(), k=rng.randrange(10, 200)))
            (root / source / f"{index:03}.txt").write_text(text, encoding="utf-8")


def _last(text: str, pattern: str) -> int | None:
    found = re.findall(pattern, text, re.MULTILINE)
    return int(found[-1]) if found else None
