"""A process's place in its job: from options, or from the variables that a launcher sets. Imports no JAX."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lmx.errors import UserError

PORT = 8476
START_SECONDS, HEARTBEAT_SECONDS = 300, 60
ALONE = "--processes 1 (or LMX_PROCESSES=1) runs this process alone"


@dataclass(frozen=True)
class Cluster:
    """How several processes find each other. Slurm, Open MPI, Kubernetes and TPU VMs tell it all by themselves."""

    coordinator: str = ""
    """HOST:PORT of process 0, if no launcher tells it; or $LMX_COORDINATOR."""
    processes: int = 0
    """How many processes there are; or $LMX_PROCESSES. 1 runs alone, whatever a launcher says."""
    process: int = -1
    """Which of them this is, from 0; or $LMX_PROCESS."""
    start_seconds: int = 0
    """Within this time all must have come; or $LMX_START_SECONDS, or 300."""
    heartbeat_seconds: int = 0
    """A process that is silent for so long counts as dead; or $LMX_HEARTBEAT_SECONDS, or 60."""

    def start_limit(self, environ: Mapping[str, str] = os.environ) -> int:
        """Seconds within which all processes must have come."""
        return self.start_seconds or _number(environ, "LMX_START_SECONDS") or START_SECONDS

    def heartbeat_limit(self, environ: Mapping[str, str] = os.environ) -> int:
        """Seconds of silence after which a process counts as dead."""
        return self.heartbeat_seconds or _number(environ, "LMX_HEARTBEAT_SECONDS") or HEARTBEAT_SECONDS


DETECTED = Cluster()
"""What the environment says, and nothing else."""


@dataclass(frozen=True)
class Place:
    """One process among those of its job.

    Attributes:
      launcher: who started it.
      coordinator: HOST:PORT, or None where JAX's own detection knows it.
      processes, process: how many there are and which this is; None where JAX's own detection knows.
      local: this process's number among those on its host, and how many these are; None where unknown.
    """

    launcher: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    local: tuple[int, int] | None = None


@dataclass(frozen=True)
class Launcher:
    """The variables of a launcher; all of ``needed`` are there in a process that it started."""

    name: str
    size: str
    rank: str
    needed: tuple[str, ...]
    advice: str

    def found(self, environ: Mapping[str, str]) -> bool:
        """Whether it has started several processes. The batch script of a job is not yet one of them, and says so."""
        if self.size in environ:
            return _number(environ, self.size) != 1
        return environ.get(self.rank, "0") != "0"

    def check(self, environ: Mapping[str, str]) -> None:
        """Raises UserError if only a part of its variables is there."""
        names = (self.size, self.rank, *self.needed)
        missing = [name for name in names if name not in environ]
        if missing:
            there = ", ".join(f"{name}={environ[name]}" for name in names if name in environ)
            raise UserError(
                f"the environment of {self.name} is half set: {there} is there, {', '.join(missing)} is missing; "
                f"{self.advice}, or {ALONE}"
            )


SLURM = Launcher(
    "Slurm",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID"),
    "start the command with srun",
)
OPEN_MPI = Launcher(
    "Open MPI",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_MCA_orte_hnp_uri"),
    "start the command with mpirun of Open MPI 4, or give --coordinator HOST:PORT",
)


def place_variables(coordinator: str, processes: int, process: int) -> dict[str, str]:
    """The variables that tell one of several processes on this host its place."""
    return {
        "LMX_COORDINATOR": coordinator,
        "LMX_PROCESSES": str(processes),
        "LMX_PROCESS": str(process),
        "LMX_LOCAL_PROCESSES": str(processes),
        "LMX_LOCAL_PROCESS": str(process),
    }


def free_port() -> int:
    """A port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_place(options: Cluster, environ: Mapping[str, str] = os.environ, host: str = "") -> Place | None:
    """This process's place, or None if it is alone.

    Each of coordinator, processes and process is taken from the options, else from ``LMX_...``, else from Open MPI,
    Slurm, or a Kubernetes indexed job, in this order.

    Args:
      options: what the command line says.
      environ: the environment.
      host: this host's full name; asked of the system by default, where it matters.

    Raises:
      UserError: what is there does not suffice, or does not fit together.
    """
    own = _own(options, environ)
    if own.processes == 1:
        return None
    for find in (_open_mpi, _slurm, _kubernetes):
        place = find(own, environ, host)
        if place is not None:
            return _checked(place)
    if (own.coordinator, own.processes, own.process) == (None, None, None):
        return Place("TPU") if _on_tpu_vm() else None
    return _checked(own)


def local_device_ids(
    place: Place, environ: Mapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> list[int] | None:
    """The GPUs of a host that one of its processes takes; none named is all that it sees, None is JAX's own setting.

    JAX's own choice is the one of the process's local number, which wastes the others where a host runs one process.

    Raises:
      UserError: the processes of this host do not divide its GPUs.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    index, count = place.local or (0, 1)
    gpus = _visible_gpus(environ, devices)
    if count == 1 or 0 < gpus < count:  # fewer than processes: the launcher has given each its own
        return []
    if gpus % count:
        raise UserError(
            f"this host runs {count} processes, which do not divide its {gpus} GPUs; start one process, or one for each"
        )
    share = max(gpus // count, 1)
    return list(range(index * share, (index + 1) * share))


def _own(options: Cluster, environ: Mapping[str, str]) -> Place:
    """What the options and our own variables say, complete or not."""
    process = options.process if options.process >= 0 else _number(environ, "LMX_PROCESS")
    index, count = _number(environ, "LMX_LOCAL_PROCESS"), _number(environ, "LMX_LOCAL_PROCESSES")
    return Place(
        "the options",
        options.coordinator or environ.get("LMX_COORDINATOR") or None,
        options.processes or _number(environ, "LMX_PROCESSES"),
        process,
        None if index is None or count is None else (index, count),
    )


def _open_mpi(own: Place, environ: Mapping[str, str], host: str) -> Place | None:
    if not OPEN_MPI.found(environ):
        return None
    if own.coordinator is None:
        OPEN_MPI.check(environ)
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"), _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    return _with_rank(own, OPEN_MPI, environ, local)


def _slurm(own: Place, environ: Mapping[str, str], host: str) -> Place | None:
    if not SLURM.found(environ) or (own.coordinator and own.processes and own.process is not None):
        return None
    SLURM.check(environ)
    counts = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environ, "SLURM_NODEID") or 0
    return _with_rank(
        own, SLURM, environ, (_number(environ, "SLURM_LOCALID"), counts[node] if node < len(counts) else None)
    )


def _with_rank(
    own: Place, launcher: Launcher, environ: Mapping[str, str], local: tuple[int | None, int | None]
) -> Place:
    """A place whose numbers the launcher has given, but for those that are its own."""
    index, count = local
    return Place(
        launcher.name,
        own.coordinator,
        own.processes or _number(environ, launcher.size),
        own.process if own.process is not None else _number(environ, launcher.rank),
        own.local or (None if index is None or count is None else (index, count)),
    )


def _kubernetes(own: Place, environ: Mapping[str, str], host: str) -> Place | None:
    """An indexed job whose pods have a headless service: pod 0 is called like this one, with another number."""
    index = _number(environ, "JOB_COMPLETION_INDEX")
    if index is None or own.process is not None:
        return None
    name, _, domain = (host or socket.getfqdn()).partition(".")
    derived = f"{name.removesuffix(f'-{index}')}-0.{domain}:{PORT}" if domain and name.endswith(f"-{index}") else None
    coordinator = own.coordinator or derived
    missing = [n for n, v in (("LMX_PROCESSES", own.processes), ("LMX_COORDINATOR", coordinator)) if not v]
    if missing:
        raise UserError(
            f"the environment of Kubernetes is half set: JOB_COMPLETION_INDEX={index} is there, {', '.join(missing)} "
            f"is missing; set it in the manifest as launch/kubernetes.yaml does, or {ALONE}"
        )
    return Place("Kubernetes", coordinator, own.processes, index, own.local)


def _checked(place: Place) -> Place:
    """The place, if its parts are all there and fit together."""
    parts = {"LMX_COORDINATOR": place.coordinator, "LMX_PROCESSES": place.processes, "LMX_PROCESS": place.process}
    detected = place.launcher in (SLURM.name, OPEN_MPI.name) and place.coordinator is None
    missing = [name for name, value in parts.items() if value is None and not (detected and name == "LMX_COORDINATOR")]
    if missing:
        there = ", ".join(f"{name}={value}" for name, value in parts.items() if value is not None)
        raise UserError(
            f"several processes are half set: {there} is there, {', '.join(missing)} is missing; give all of "
            f"--coordinator HOST:PORT, --processes N and --process I (or these variables), or {ALONE}"
        )
    if place.coordinator is not None and not re.fullmatch(r".+:\d+", place.coordinator):
        raise UserError(f"the coordinator is {place.coordinator!r}, expected HOST:PORT, as node1:{PORT}")
    processes, process = place.processes or 0, place.process or 0
    if not 0 <= process < processes:
        raise UserError(f"this is process {process} of {processes}; expected a number from 0 to {processes - 1}")
    return place


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None or text == "":
        return None
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}, expected a number")
    return int(text)


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's ``2(x3),1`` as ``[2, 2, 2, 1]``."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _visible_gpus(environ: Mapping[str, str], devices: Path) -> int:
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if name in environ:
            return len([part for part in environ[name].split(",") if part])
    return sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def _on_tpu_vm() -> bool:
    """Whether TPU chips and their library are here; whether they are part of a slice, JAX's detection knows."""
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and find_spec("libtpu") is not None
