"""Devices that are not there: a TPU slice by its name, or virtual CPU devices, to compile programs for."""

import importlib.util
import os
import re
from collections.abc import Sequence

import jax

from lmx.errors import UserError

FORM = re.compile(r"(cpu|v\w+|tpu\w+):(\d+(?:x\d+)*)")
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
"""Without these, libtpu looks for the TPU host that it is not on, for minutes, and complains of it."""


def topology_devices(name: str, slices: int = 1) -> Sequence[jax.Device]:
    """The devices of a topology, to build a mesh of and to compile for; nothing runs on them.

    Args:
      name: ``v5p:4x4x4``, a TPU slice as its chips lie (also v4, v5e, v6e, tpu7x), or ``cpu:8``, virtual CPU devices
        of this process, which must not have looked for its devices yet.
      slices: how many such slices the data-centre network connects.

    Raises:
      UserError: the name is of no topology, there are too few CPU devices, or the TPU compiler is not installed.
    """
    found = FORM.fullmatch(name)
    if not found or slices < 1:
        raise UserError(f"--topology is {name!r}, expected a kind of TPU and its chips as v5p:2x2x2, or cpu:8")
    if found[1] == "cpu":
        return _virtual(int(found[2]) if found[2].isdecimal() else 0, name, slices)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"to compile for {name} takes the TPU compiler, libtpu; pip install 'lmx[tpu]' brings it")
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        said = str(error).splitlines()[0][:200]
        if "lockfile" in said:
            raise UserError(f"another process on this host uses libtpu; wait until it has ended ({said})") from error
        raise UserError(f"libtpu knows no topology {name}; expected one as v5p:2x2x2 or v5e:4x4 ({said})") from error


def _virtual(count: int, name: str, slices: int) -> Sequence[jax.Device]:
    devices = jax.devices("cpu")
    if not 0 < count * slices <= len(devices):
        raise UserError(f"--topology {name}, {slices} of them: this process has {len(devices)} CPU devices")
    return devices[: count * slices]
