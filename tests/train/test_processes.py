"""Two real processes on this host: the same run as one, their preflight, and what happens when one fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from jobs import ROOT, TRAIN, environment, metrics, set_up

LOCAL = (sys.executable, str(ROOT / "launch" / "local.py"))
STEPS = 40
CHECK = (sys.executable, "-m", "lmx.cli.main", "check", "cluster")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    set_up(root)
    return root


@pytest.fixture(scope="module")
def calm(root: Path) -> list[dict[str, Any]]:
    """The metrics of a run in one process with eight devices that nothing disturbs."""
    train(root, "calm")
    return metrics(root / "calm")


def train(root: Path, run: str) -> None:
    command = [*TRAIN, "--run-dir", run, "--train.steps", str(STEPS)]
    subprocess.run(command, cwd=root, env=environment(8), check=True, capture_output=True, timeout=240)


class Job:
    """Two processes under launch/local.py, four devices each."""

    def __init__(self, root: Path, run: str, *options: str):
        self.log, self.run = root / f"{run}.log", root / run
        command = [*LOCAL, "--processes", "2", "--start-seconds", "120", *options, "--", *TRAIN]
        command += ["--run-dir", run, "--train.steps", str(STEPS)]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, cwd=root, env=environment(4), stdout=file, stderr=file)

    def signal_after(self, step: int, number: int, index: int) -> None:
        """Sends a signal to one of the two when a step was logged."""
        end = time.monotonic() + 240
        while f"step {step}/" not in self.log.read_text():
            running = self.process.poll() is None and time.monotonic() < end
            assert running, self.log.read_text()[-3000:]
            time.sleep(0.02)
        os.kill(self._pid(index), number)

    def _pid(self, index: int) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        places = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
        return next(int(p) for p, text in places.items() if f"\0LMX_PROCESS={index}\0".encode() in text)

    def end(self, seconds: float) -> tuple[int, str]:
        """The exit code and the log."""
        try:
            code = self.process.wait(seconds)
        finally:
            self.process.kill()
        return code, self.log.read_text()


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for line, other in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6), line["step"]
    assert found[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], rel=1e-6)


def test_sigterm_to_one_saves_on_both_and_one_process_goes_on(root: Path, calm: list[dict[str, Any]]) -> None:
    job = Job(root, "interrupted")
    job.signal_after(6, signal.SIGTERM, 1)
    code, log = job.end(60)
    assert code == 75, log[-3000:]
    for index in (0, 1):
        assert f"process {index} of 2 on {socket.gethostname()}: stopped by a signal" in log
    before = metrics(job.run)
    assert 6 <= len(before) < STEPS
    train(root, "interrupted")
    assert_same(metrics(job.run), calm)


def test_a_killed_process_ends_the_job_which_starts_again(root: Path, calm: list[dict[str, Any]]) -> None:
    job = Job(root, "killed", "--restarts", "1", "--heartbeat-seconds", "20")
    job.signal_after(9, signal.SIGKILL, 1)
    code, log = job.end(240)
    assert code == 0, log[-3000:]
    assert "process 1 was ended by SIGKILL; starting again, 0 restarts left" in log
    assert "process 0 of 2 on" in log
    assert "going on after step" in log
    assert_same(metrics(job.run), calm)


def test_a_stopped_process_ends_the_job_within_the_heartbeat(root: Path) -> None:
    job = Job(root, "stopped", "--heartbeat-seconds", "10")
    job.signal_after(9, signal.SIGSTOP, 1)
    code, log = job.end(40)
    assert code == 75, log[-3000:]
    assert "process 1 gave no sign of life and was killed; exit code 75" in log


def both(directories: list[Path], *commands: tuple[str, ...]) -> list[tuple[int, str]]:
    """The exit code and output of two processes that find each other by themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = []
    for index, command in enumerate(commands):
        place = {"LMX_COORDINATOR": address, "LMX_PROCESSES": "2", "LMX_PROCESS": str(index)}
        environ = environment(2, **place, LMX_START_SECONDS="60", LMX_HEARTBEAT_SECONDS="20")
        output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=directories[index], env=environ, **output))
    outputs = [process.communicate(timeout=200)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def test_different_configurations_are_told_apart(root: Path) -> None:
    command = (*TRAIN, "--run-dir", "different")
    for code, output in both([root, root], command, (*command, "--train.seed", "5")):
        assert code == 2, output
        assert f"train.seed is 5 on process 1 ({socket.gethostname()}), but 0 on process 0" in output


@pytest.mark.slow
def test_storage_that_is_not_shared_is_told(root: Path, tmp_path: Path) -> None:
    for code, output in both([root, tmp_path], (*CHECK, "--directory", "here"), (*CHECK, "--directory", "here")):
        assert code == 2, output
        assert "here is not shared: process 1" in output


@pytest.mark.slow
def test_check_cluster_reports_every_process(root: Path) -> None:
    (code, output), (other, silent) = both([root, root], (*CHECK, "--json", "cluster.json"), CHECK)
    assert (code, other) == (0, 0), output + silent
    found = json.loads((root / "cluster.json").read_text())
    assert [facts["process"] for facts in found["processes"]] == [0, 1]
    assert found["devices"] == 4
    assert "all-reduce of 4.2 MB: right" in output
    assert "all-reduce" not in silent


@pytest.mark.slow
@pytest.mark.parametrize(("index", "words"), [(1, "did not answer within 4 s"), (0, "not all of the 2 processes came")])
def test_an_absent_process_ends_the_other_in_time(root: Path, index: int, words: str) -> None:
    place = ["--coordinator", "127.0.0.1:9", "--processes", "2", "--process", str(index), "--start-seconds", "4"]
    if index == 0:
        place[1] = "127.0.0.1:28476"
    done = subprocess.run([*CHECK, *place], cwd=root, env=environment(1), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


READ = """
import sys
import jax, numpy as np
from lmx.data.loader import Loader
from lmx.data.rows import KEYS
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.processes import index, start
from jax.sharding import NamedSharding, PartitionSpec

start()
read = []

class Rows:
    def __len__(self):
        return 100

    def __getitem__(self, index):
        read.append(index)
        return {key: np.full(4, index, np.int32) for key in KEYS}

mesh = build_mesh(MeshConfig(data=2, fsdp=2))
with Loader(Rows(), batch=8, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp")))) as loader:
    loader.close()
    read.clear()
    batch = loader.read(5)
print(f"process {index()} read {sorted(read)}; the sum of all is {int(batch['tokens'].sum())}", flush=True)
"""


def test_each_process_reads_only_its_rows(root: Path) -> None:
    command = (sys.executable, "-c", READ)
    (code, first), (other, second) = both([root, root], command, command)
    assert (code, other) == (0, 0), first + second
    total = 4 * sum(range(40, 48))
    assert f"process 0 read [40, 41, 42, 43]; the sum of all is {total}" in first
    assert f"process 1 read [44, 45, 46, 47]; the sum of all is {total}" in second
