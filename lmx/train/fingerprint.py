"""What bitwise repetition depends on: recorded in the run, compared when it goes on."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lmx.data.prepare import Prepared
from lmx.errors import UserError
from lmx.experiment import RunDir
from lmx.files import read_json

DATA_KEYS = ("data", "tokenizer")
SOFTWARE = ("lmx", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SETTINGS = (
    *("jax_default_matmul_precision", "jax_enable_x64", "jax_numpy_dtype_promotion", "jax_use_shardy_partitioner"),
    *("jax_default_prng_impl", "jax_enable_custom_prng", "jax_random_seed_offset"),
    *("jax_threefry_partitionable", "jax_threefry_gpu_kernel_lowering"),
)
"""JAX's settings that change results, by whichever way they were set; a version may lack some."""
ARGUMENTS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
CPU = Path("/proc/cpuinfo")
VECTORS = re.compile(r"avx\w*|fma\w*|f16c|amx\w*|asimd\w*|sve\w*|bf16|i8mm")
"""Instruction sets among a CPU's flags whose code computes in another order or precision."""


def fingerprint(mesh: Mesh, prepared: Prepared) -> dict[str, Any]:
    """The software, the devices, the flags and the data, as JSON-ready data."""
    device = mesh.devices.flat[0]
    return {
        **{package: _version(package) for package in SOFTWARE},
        "python": platform.python_version(),
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "processes": jax.process_count(),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **{name.lower(): os.environ.get(name, "") for name in ARGUMENTS},
        **{name: jax.config.values[name] for name in SETTINGS if name in jax.config.values},
        "data": prepared.fingerprint,
        "tokenizer": prepared.tokenizer.fingerprint,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The CPU's model and the instruction sets that XLA compiles for; the architecture alone where no more is told."""
    first = CPU.read_text(encoding="utf-8").split("\n\n")[0] if CPU.exists() else ""
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    flags = told.get("flags", told.get("Features", "")).split()
    sets = " ".join(sorted(flag for flag in flags if VECTORS.fullmatch(flag)))
    return f"{told.get('model name', platform.machine())} ({sets})" if sets else platform.machine()


def compare(run: RunDir, now: dict[str, Any]) -> list[str]:
    """What differs from when the run was last trained, apart from its data, as sentences.

    Raises:
      UserError: the data or the tokenizer are not those that the run has been trained on, or what was recorded is
        damaged.
    """
    if not run.fingerprint.exists():
        return []
    before = read_json(run.fingerprint)
    changed = [key for key in now if before.get(key, now[key]) != now[key]]
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
