"""Runs one command as N processes on this host, as one job.

python launch/local.py --processes 2 --restarts 3 -- lmx train configs/quickstart.py --mesh.fsdp 2

Each line of output begins with its process. When one process dies or hangs, the others end too, and the job starts
again from the last checkpoint as often as --restarts says. Ctrl-C and SIGTERM go to all: a training saves and ends
with exit code 75, and the same command goes on with it.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from lmx.sharding.launchers import HEARTBEAT_SECONDS, START_SECONDS, free_port, place_variables
from lmx.train.supervise import Command, Limits, Supervisor


@dataclass(frozen=True)
class Local:
    """Runs one command as N processes on this host, as one job."""

    command: tyro.conf.Positional[tuple[str, ...]]
    """What to run, after "--"."""
    processes: int = 2
    """How many processes; the host's GPUs are divided among them."""
    devices: int = 0
    """Virtual CPU devices of each process, to try a mesh without accelerators; 0 uses the real ones."""
    restarts: int = 0
    """How often to start again after a process died or hung."""
    start_seconds: int = START_SECONDS
    """Within this time the processes must have found each other."""
    heartbeat_seconds: int = HEARTBEAT_SECONDS
    """A process that is silent for so long counts as dead."""

    def commands(self) -> list[Command]:
        """The processes of one attempt, with a port that is free now."""
        address = f"127.0.0.1:{free_port()}"
        return [
            Command(self.command, self.environment(address, index), f"process {index}")
            for index in range(self.processes)
        ]

    def environment(self, address: str, index: int) -> dict[str, str]:
        """What tells a process its place."""
        virtual = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={self.devices}".strip()
        return {
            **os.environ,
            **({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": virtual} if self.devices else {}),
            **place_variables(address, self.processes, index),
            "LMX_START_SECONDS": str(self.start_seconds),
            "LMX_HEARTBEAT_SECONDS": str(self.heartbeat_seconds),
            "PYTHONUNBUFFERED": "1",
        }


def main(argv: Sequence[str]) -> int:
    """Runs the job; its exit code is that of ``lmx train``."""
    job = tyro.cli(Local, args=list(argv), description=__doc__)
    limits = Limits(job.restarts, job.start_seconds, job.heartbeat_seconds)
    return Supervisor(limits, lambda text: print(f"launch/local.py: {text}", file=sys.stderr, flush=True)).run(
        job.commands
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
