"""A real Slurm on this machine: its daemons run on loopback, with everything in a temporary directory."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from jobs import ROOT, TRAIN, environment, metrics, set_up

NEEDED = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo")
MISSING = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed here ({', '.join(MISSING)}): slurm-wlm, munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts other users' processes, so it must run as root"),
]
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
SlurmctldParameters=enable_configless
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:2
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def daemon(log: Path, *command: str, **environ: str) -> Iterator[None]:
    """A process that ends with the block."""
    found = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin")
    with log.open("wb") as file:
        process = subprocess.Popen([str(found), *command[1:]], stdout=file, stderr=file, env={**os.environ, **environ})
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables with which a command finds this Slurm."""
    root = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (root / name).mkdir()
    key, conf = root / "munge.key", root / "slurm.conf"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    ports = {"controller": free_port(), "node": free_port()}
    conf.write_text(CONF.format(root=root, host=socket.gethostname().split(".")[0], **ports))
    munge = ["--foreground", "--force", f"--socket={root}/munge.socket", f"--key-file={key}"]
    munge += [f"--{name}-file={root}/munge.{name}" for name in ("log", "pid", "seed")]
    found = {"SLURM_CONF": str(conf)}
    with ExitStack() as stack:
        stack.enter_context(daemon(root / "munged.out", "munged", *munge))
        stack.enter_context(daemon(root / "slurmctld.out", "slurmctld", "-D", "-i", **found))
        stack.enter_context(daemon(root / "slurmd.out", "slurmd", "-D", **found))
        wait_until_idle(root, found)
        yield found


def wait_until_idle(root: Path, found: dict[str, str]) -> None:
    end, state = time.monotonic() + 60, ""
    while "idle" not in state:
        if time.monotonic() > end:
            logs = "\n".join(f.read_text(errors="replace")[-1500:] for f in sorted(root.glob("*.log")))
            raise AssertionError(f"Slurm does not come up: {state}\n{logs}")
        asked = subprocess.run(["sinfo", "-h", "-o", "%T"], env={**os.environ, **found}, capture_output=True, text=True)
        state = asked.stdout + asked.stderr
        time.sleep(0.2)


def test_srun_starts_a_job_of_two_processes_without_flags(slurm: dict[str, str], tmp_path: Path) -> None:
    set_up(tmp_path)
    command = ["srun", "--ntasks", "2", "--overcommit", "--label", *TRAIN, "--run-dir", "run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(1, **slurm), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 processes with 2 devices" in done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))


def test_a_batch_script_without_srun_is_told_so(slurm: dict[str, str], tmp_path: Path) -> None:
    set_up(tmp_path)
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/sh\n{' '.join(TRAIN)} --run-dir run\n")
    command = ["sbatch", "--wait", "--ntasks", "2", "--output", "log", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(1, **slurm), timeout=120)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 2, log
    assert "SLURM_NTASKS=2" in log
    assert "SLURM_STEP_NODELIST is missing; start the command with srun" in log


@pytest.mark.slow
def test_the_batch_script_runs_a_job(slurm: dict[str, str], tmp_path: Path) -> None:
    set_up(tmp_path)
    options = ["--wait", "--nodes", "1", "--ntasks-per-node", "2", "--output", "log"]
    command = ["sbatch", *options, str(ROOT / "launch" / "slurm.sbatch"), *TRAIN, "--run-dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(1, **slurm), timeout=240)
    assert done.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "run" / "summary.json").exists()
