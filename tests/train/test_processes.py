"""Two real processes on this host: the same run as one, their preflight, and what happens when one fails."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from jobs import ROOT, TRAIN, both, environment, metrics, set_up

from lmx.cli.recipes import load_recipe
from lmx.train.run import train

LOCAL = (sys.executable, str(ROOT / "launch" / "local.py"))
STEPS = 40
CHECK = (sys.executable, "-m", "lmx.cli.main", "check", "cluster")
WATCHED = """
import json
import os
import time

from lmx.data.loader import Loader
from tiny import tiny

PROCESS = os.environ["LMX_PROCESS"]
read, upcoming = Loader.read, Loader.__next__


class Spied:
    def __init__(self, rows):
        self.rows, self.seen = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.seen.append(index)
        return self.rows[index]


def watched_read(loader, step):
    rows, loader._rows = loader._rows, Spied(loader._rows)
    batch, seen, loader._rows = read(loader, step), loader._rows.seen, rows
    if len(rows) > 10**9:  # those of training
        with open(f"rows_{PROCESS}.jsonl", "a") as file:
            file.write(json.dumps([step, sorted(seen)]) + "\\n")
    return batch


def slow_next(loader):
    time.sleep(0.3 * (PROCESS == "1"))  # not in read(), which may be ahead of a slow machine's steps
    return upcoming(loader)


Loader.read, Loader.__next__ = watched_read, slow_next
watched = tiny
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    set_up(root)
    (root / "watched.py").write_text(WATCHED)
    return root


@pytest.fixture(scope="module")
def calm(root: Path) -> list[dict[str, Any]]:
    """The metrics of a run in one process with eight devices that nothing disturbs."""
    alone(root, "calm")
    return metrics(root / "calm")


def alone(root: Path, run: str, *overrides: str) -> None:
    """Trains in this process, with its eight devices."""
    with contextlib.chdir(root):
        train(load_recipe("tiny.py", ["--train.steps", str(STEPS), *overrides]), root / run)


class Job:
    """Two processes under launch/local.py, four devices each."""

    def __init__(self, root: Path, run: str, *options: str, recipe: str = "tiny.py", more: tuple[str, ...] = ()):
        self.log, self.run = root / f"{run}.log", root / run
        command = [*LOCAL, "--processes", "2", "--start-seconds", "120", *options, "--", *TRAIN[:-1], recipe]
        command += ["--run-dir", run, "--train.steps", str(STEPS), *more]
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


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float = 1e-6) -> None:
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for line, other in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=rel), line["step"]
    assert found[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], rel=rel)


def test_sigterm_to_one_saves_on_both_and_one_process_goes_on(root: Path, calm: list[dict[str, Any]]) -> None:
    """One of the two is slow to take its rows; each reads only its own; one process with all devices goes on."""
    job = Job(root, "interrupted", recipe="watched.py")
    job.signal_after(6, signal.SIGTERM, 1)
    code, log = job.end(60)
    assert code == 75, log[-3000:]
    host = socket.gethostname()
    for index in (0, 1):
        assert f"process {index} of 2 on {host}: stopped by a signal" in log
    before = metrics(job.run)
    assert 6 <= len(before) < STEPS
    assert f"slowest process 1 ({host}): " in log
    assert 1 in [line.get("slowest_process") for line in before]
    told = [json.loads(line) for line in (job.run / "hosts.jsonl").read_text().splitlines()]
    assert set(told[-1]["own_seconds"]) == {f"0 ({host})", f"1 ({host})"}
    for index in (0, 1):
        for line in (root / f"rows_{index}.jsonl").read_text().splitlines():
            step, rows = json.loads(line)
            assert rows == list(range(8 * step + 4 * index, 8 * step + 4 * index + 4))
    alone(root, "interrupted")
    assert_same(metrics(job.run), calm)
    goodput = json.loads((job.run / "summary.json").read_text())["goodput"]
    assert goodput["attempts"] == 2
    assert goodput["seconds"]["start_up"] > 0
    assert goodput["seconds"]["repeated"] < 0.5 * goodput["seconds"]["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
def test_a_killed_job_starts_again_from_local_checkpoints_unless_a_node_was_replaced(
    root: Path, calm: list[dict[str, Any]], replaced: bool
) -> None:
    name = f"killed_{replaced}"
    split = ("--mesh.data", "1", "--mesh.fsdp", "8")  # so that neither process has the shards of the other
    more = (*split, "--checkpoint.local-directory", str(root / f"ssd_{replaced}"), "--checkpoint.local-every", "1")
    job = Job(root, name, "--restarts", "1", "--heartbeat-seconds", "20", more=(*more, "--checkpoint.every", "20"))
    job.signal_after(25, signal.SIGKILL, 1)  # the durable checkpoints before and after it are far away
    if replaced:
        for folder in (root / f"ssd_{replaced}").glob("*/process-1"):
            shutil.rmtree(folder)
    code, log = job.end(240)
    assert code == 0, log[-3000:]
    assert "process 1 was ended by SIGKILL; starting again, 0 restarts left" in log
    assert "process 0 of 2 on" in log
    assert (", from the local checkpoints" in log) is not replaced
    passed_over = log.count("has no shards on this host") + log.count("lacks shards of")
    # Nobody's shards are gone otherwise, but one process can die before its part of the newest is written.
    assert passed_over > 0 if replaced else passed_over <= 1
    assert_same(metrics(job.run), calm, rel=1e-5)
    assert not list((root / f"ssd_{replaced}").glob("*/*/*"))


@pytest.mark.slow
def test_a_stopped_process_ends_the_job_within_the_heartbeat(root: Path) -> None:
    job = Job(root, "stopped", "--heartbeat-seconds", "10")
    job.signal_after(9, signal.SIGSTOP, 1)
    code, log = job.end(40)
    assert code == 75, log[-3000:]
    assert "process 1 gave no sign of life and was killed; exit code 75" in log


def test_different_configurations_are_told_apart(root: Path) -> None:
    command = (*TRAIN, "--run-dir", "different")
    for code, output in both([root, root], command, (*command, "--train.seed", "5")):
        assert code == 2, output
        assert f"train.seed is 5 on process 1 ({socket.gethostname()}), but 0 on process 0" in output


@pytest.mark.slow
def test_different_data_is_told_apart(root: Path, tmp_path: Path) -> None:
    set_up(tmp_path)
    (tmp_path / "corpus" / "00.txt").write_text("another cat sat on another mat")
    command = (*TRAIN, "--run-dir", str(root / "other_data"))
    for code, output in both([root, tmp_path], command, command):
        assert code == 2, output
        assert "the data is" in output
        assert "give every process the same data" in output


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


ABSENT = [(1, "did not answer within 4 s"), pytest.param(0, "not all of the 2 processes came", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("index", "words"), ABSENT)
def test_an_absent_process_ends_the_other_in_time(root: Path, index: int, words: str) -> None:
    place = ["--coordinator", "127.0.0.1:9", "--processes", "2", "--process", str(index), "--start-seconds", "4"]
    if index == 0:
        place[1] = "127.0.0.1:28476"
    done = subprocess.run([*CHECK, *place], cwd=root, env=environment(1), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
