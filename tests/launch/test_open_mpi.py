"""A real mpirun on this machine."""

import shutil
import subprocess
from pathlib import Path

import pytest
from jobs import TRAIN, environment, metrics, set_up

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed here: openmpi-bin")


def test_mpirun_starts_a_job_of_two_processes_without_flags(tmp_path: Path) -> None:
    set_up(tmp_path)
    command = ["mpirun", "--oversubscribe", "--allow-run-as-root", "-n", "2", *TRAIN, "--run-dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(1), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 processes with 2 devices" in done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))
