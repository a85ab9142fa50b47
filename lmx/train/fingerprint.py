"""What bitwise repetition depends on: recorded in the run, compared when it goes on."""

import os
import platform
from importlib.metadata import version
from typing import Any

import jax
from jax.sharding import Mesh

from lmx.data.prepare import Prepared
from lmx.errors import UserError
from lmx.experiment import RunDir
from lmx.files import read_json

DATA_KEYS = ("data", "tokenizer")


def fingerprint(mesh: Mesh, prepared: Prepared) -> dict[str, Any]:
    """The software, the devices, the flags and the data, as JSON-ready data."""
    return {
        "lmx": version("lmx"),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "python": platform.python_version(),
        "device": mesh.devices.flat[0].device_kind,
        "processes": jax.process_count(),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "data": prepared.fingerprint,
        "tokenizer": prepared.tokenizer.fingerprint,
    }


def compare(run: RunDir, now: dict[str, Any]) -> list[str]:
    """What differs from when the run was last trained, apart from its data, as sentences.

    Raises:
      UserError: the data or the tokenizer are not those that the run has been trained on, or what was recorded is
        damaged.
    """
    if not run.fingerprint.exists():
        return []
    before = read_json(run.fingerprint)
    changed = [key for key in now if before.get(key) != now[key]]
    lost = [key for key in changed if key in DATA_KEYS]
    if lost:
        raise UserError(
            f"the {lost[0]} of {run.path} was {before.get(lost[0])} and is now {now[lost[0]]}: the text or the "
            f"tokenizer changed; restore them, or train in another --run-dir (with --init-from {run.path} to keep the "
            f"weights)"
        )
    return [
        f"{key} was {before.get(key)} and is now {now[key]}: losses agree up to rounding, not bit for bit"
        for key in changed
    ]
