"""What every command that computes sets up first."""

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lmx.errors import UserError
from lmx.sharding.launchers import DETECTED, Cluster

if TYPE_CHECKING:
    from lmx.cli.recipes import Placement
    from lmx.decode.loaded import Model

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def start_jax(cluster: Cluster = DETECTED) -> None:
    """Joins the other processes, if there are any, and turns on JAX's compilation cache.

    The cache is in $LMX_CACHE or ~/.cache/lmx unless JAX's own setting names a place.

    Raises:
      UserError: the options or variables that place this process among others are incomplete.
    """
    _keep_freed_memory()
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        root = os.environ.get("LMX_CACHE") or Path.home() / ".cache" / "lmx"
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    from lmx.sharding.processes import start

    start(cluster)


def load_placed(path: str, place: "Placement", *, step: int | None = None, reading: str = "") -> "Model":
    """The model in a directory, where the command's options say.

    Raises:
      UserError: as ``lmx.load``; or several processes, and nothing says how the model lies on their devices.
    """
    from lmx.decode.load import load
    from lmx.sharding.processes import count

    if place.mesh is None and count() > 1:
        raise UserError(f"there are {count()} processes: say how the model lies on their devices, as --layout fsdp")
    if place.mesh is None and reading:
        raise UserError("--prefill-layout is for a model on a mesh; say which, as --layout 2d_weight_stationary")
    return load(path, step=step, mesh=place.mesh, rules=place.rules, reading=reading or None)


def _keep_freed_memory() -> None:
    """Lets glibc keep what XLA:CPU frees after a step.

    A step's temporaries are gigabytes. By default each is mapped anew every step, and every page of it zeroed by the
    kernel: that was a seventh of a GPT-2 step.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
