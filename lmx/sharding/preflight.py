"""Before several processes compute together: are they alike, do their clocks agree, is their storage shared?"""

import json
import platform
import socket
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from lmx.errors import LmxError, UserError
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.processes import agreed, count, index, is_first, share
from lmx.sharding.storage import storage

CLOCK_SECONDS = 5.0
"""How far clocks may be apart."""
VISIBLE_SECONDS = 10.0
"""How long a shared file system may take to show a new file."""
DEVICE_SECONDS = 600.0
"""How long devices may take to start."""
FLOATS = 1 << 20
"""Numbers of each device in the all-reduce."""


@dataclass(frozen=True)
class Report:
    """What the preflight found: every process's facts, and the all-reduce."""

    processes: tuple[dict[str, Any], ...]
    clock_seconds: float
    """How far the clocks are apart, the time to ask included."""
    devices: int
    reduce_bytes: int
    """Bytes of each device that were summed."""
    reduce_seconds: float
    """The median time of that."""

    def data(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self)


def preflight(directories: Sequence[str], settings: Mapping[str, Any], seconds: float) -> Report:
    """Checks that these processes can work together; every process calls it, and each gets the same result.

    Args:
      directories: places that all must share: paths, or addresses of an object store.
      settings: what must be the same everywhere, by name, such as the fields of the configuration.
      seconds: how long a process may take to answer.

    Raises:
      UserError: versions, devices, settings, clocks or storage differ; it names the processes and hosts.
      LmxError: a process does not answer, or the sum over all devices is wrong.
    """
    versions = _gather(_versions(), seconds)
    hosts = tuple(facts.pop("host") for facts in versions)
    require_same(versions, hosts, "install the same on every host")
    require_same(_gather(dict(settings), seconds), hosts, "start every process with the same command")
    apart = _check_clocks(hosts, seconds)
    for directory in directories:
        _check_shared(directory, hosts, seconds)
    own = {"local devices": jax.local_device_count(), "device": jax.local_devices()[0].device_kind}
    devices = _gather(own, DEVICE_SECONDS)
    require_same(devices, hosts, "look for what is missing there")
    facts = tuple({"process": i, "host": hosts[i], **versions[i], **devices[i]} for i in range(count()))
    size, elapsed = _all_reduce()
    return Report(facts, apart, jax.device_count(), size, elapsed)


def require_same(told: Sequence[Mapping[str, Any]], hosts: Sequence[str], advice: str) -> None:
    """Raises UserError for the first name whose value is not the same in all of ``told``, by process."""
    for name in dict.fromkeys(name for facts in told for name in facts):
        values = [json.dumps(facts.get(name)) for facts in told]
        usual = Counter(values).most_common(1)[0][0]  # of equally common ones, the first process's
        odd = [i for i, value in enumerate(values) if value != usual]
        if odd:
            shown = ", ".join(f"{values[i]} on process {i} ({hosts[i]})" for i in odd[:8])
            more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
            rest = next(i for i, value in enumerate(values) if value == usual)
            raise UserError(
                f"{name} is {shown}{more}, but {usual} on process {rest} ({hosts[rest]})"
                f"{' and the rest' if len(values) - len(odd) > 1 else ''}; {advice}"
            )


def require_same_data(name: str, value: Any) -> None:
    """Raises UserError on every process if ``value`` is not the same on all of them."""
    told = [json.loads(t) for t in share(json.dumps([socket.gethostname(), value]))]
    require_same([{name: v} for _, v in told], [h for h, _ in told], "give every process the same data")


def _gather(facts: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    return [json.loads(text) for text in share(json.dumps(facts), seconds)]


def _versions() -> dict[str, Any]:
    found = {"host": socket.gethostname(), "python": platform.python_version()}
    for package in ("jax", "jaxlib", "libtpu", "lmx"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _check_clocks(hosts: Sequence[str], seconds: float) -> float:
    share("", seconds)  # all come here at about the same time
    times = [float(t) for t in share(repr(time.time()), seconds)]
    middle = statistics.median_low(times)
    for process, moment in enumerate(times):
        if abs(moment - middle) > CLOCK_SECONDS:
            raise UserError(
                f"the clock of process {process} ({hosts[process]}) is {moment - middle:+.0f} s from the others'; "
                "synchronise it (NTP)"
            )
    return max(times) - min(times)


def _check_shared(directory: str, hosts: Sequence[str], seconds: float) -> None:
    """Process 0 writes a file that all must find."""
    token = share(uuid.uuid4().hex, seconds)[0]
    with agreed():
        file = storage(directory) / f".lmx-preflight-{token}"
        if is_first():
            _write(file, token)
    sees = _gather({"sees": _appears(file, token)}, seconds)
    if is_first():
        file.unlink()
    blind = [f"process {i} ({hosts[i]})" for i, found in enumerate(sees) if not found["sees"]]
    if blind:
        raise UserError(
            f"{directory} is not shared: {', '.join(blind[:8])} cannot see what process 0 ({hosts[0]}) writes there; "
            "choose storage that every host mounts, or an object store"
        )


def _write(file: epath.Path, token: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(token)
    except OSError as error:
        raise UserError(f"{file.parent} cannot be written: {error}") from error


def _appears(file: epath.Path, token: str) -> bool:
    end = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            if file.read_text() == token:
                return True
        except OSError:
            pass  # not there yet: file systems of a network show it late
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _all_reduce() -> tuple[int, float]:
    """Sums a number of each device's own over all; bytes of each, and the median of five times."""
    mesh = build_mesh(MeshConfig())
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    devices = jax.device_count()

    def rows(at: Any) -> np.ndarray:
        return np.broadcast_to(np.arange(devices, dtype=np.float32)[at[0], None] + 1, (1, FLOATS))

    array = jax.make_array_from_callback((devices, FLOATS), split, rows)
    summed = jax.jit(lambda a: a.sum(0), out_shardings=whole)
    found = float(np.asarray(summed(array)).max())
    expected = devices * (devices + 1) / 2
    if found != expected:
        raise LmxError(f"process {index()}: the sum over all devices is {found}, expected {expected}")
    times = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(summed(array))
        times.append(time.perf_counter() - began)
    return FLOATS * 4, statistics.median(times)
