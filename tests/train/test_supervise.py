"""The parent, with children that are plain Python: no JAX, so that each takes a moment."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from lmx.train import supervise
from lmx.train.supervise import Command, Limits, Supervisor

BEAT = "from lmx.train.supervise import beat, tell; beat(0.5); tell(joined=True, checkpoints={checkpoints!r});"


def run(*bodies: str, restarts: int = 0, heartbeat: float = 5, checkpoints: str = "") -> tuple[int, list[str]]:
    """The job's status, and what was said; ``n`` in a body is the number of the attempt."""
    said: list[str] = []
    attempts = iter(range(100))

    def commands() -> list[Command]:
        start = f"n = {next(attempts)}; import os, sys, time, signal; " + BEAT.format(checkpoints=checkpoints)
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        return [Command([sys.executable, "-c", f"{start}\n{b}"], environ, f"process {i}") for i, b in enumerate(bodies)]

    status = Supervisor(Limits(restarts, 5, heartbeat), said.append).run(commands)
    return status, said


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "GRACE", 1.0)
    monkeypatch.setattr(supervise, "PAUSE", 0.1)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "manifest.json").touch()
    return str(tmp_path)


@pytest.mark.parametrize("code", [0, 1])
def test_exit_codes_are_passed_on(code: int) -> None:
    assert run(f"sys.exit({code})")[0] == code


def test_an_abort_becomes_resumable_with_a_checkpoint_and_a_failure_without(saved: str) -> None:
    assert run("os.abort()") == (1, ["process 0 was ended by SIGABRT; exit code 1"])
    assert run("os.abort()", checkpoints=saved) == (75, ["process 0 was ended by SIGABRT; exit code 75"])


def test_a_failed_job_starts_again_as_often_as_it_may() -> None:
    status, said = run("sys.exit(n < 2)", restarts=2)
    assert status == 0
    assert [text.split("; ")[1] for text in said] == [f"starting again, {n} restarts left" for n in (1, 0)]
    assert run("sys.exit(1)", restarts=1)[0] == 1


@pytest.mark.parametrize("code", [2, 75])
def test_a_mistake_or_an_interruption_does_not_start_again(code: int) -> None:
    assert run(f"sys.exit({code})", restarts=3) == (code, [])


def test_a_stopped_process_is_killed_within_the_heartbeat() -> None:
    began = time.monotonic()
    status, said = run("os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(60)", heartbeat=2)
    assert (status, said) == (1, ["process 0 gave no sign of life and was killed; exit code 1"])
    assert time.monotonic() - began < 20


def test_the_others_end_when_one_dies_and_the_cause_is_named() -> None:
    began = time.monotonic()
    status, said = run("time.sleep(60)", "os.kill(os.getpid(), 9)", "time.sleep(1); os.abort()")
    assert (status, said) == (1, ["process 1 was ended by SIGKILL; exit code 1"])
    assert time.monotonic() - began < 20


def test_signals_are_passed_on() -> None:
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    status, said = run("signal.signal(15, lambda *_: sys.exit(75)); time.sleep(60)", restarts=3)
    assert (status, said) == (75, [])


def test_lines_are_named(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run("print('one')", "print('two', file=sys.stderr)")
    out = capfdbinary.readouterr().out
    assert b"[process 0] one\n" in out
    assert b"[process 1] two\n" in out
