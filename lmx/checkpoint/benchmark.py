"""Measures the loading of a Hugging Face directory: time, and the memory of a process that does nothing else."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lmx.checkpoint.huggingface import import_params, open_directory, write_json, write_shards
from lmx.checkpoint.huggingface.plan import make_plan
from lmx.errors import LmxError
from lmx.models.config import ModelConfig


def random_directory(config: ModelConfig, folder: Path, *, dtype: Any = jnp.bfloat16, shards: int = 4) -> None:
    """Fills a folder with a Hugging Face directory of random weights, about as many files as ``shards``."""
    rng = np.random.default_rng(0)
    infos = {n: jax.ShapeDtypeStruct(h.shape, np.dtype(dtype)) for n, h in make_plan(config).holders.items()}
    total = sum(info.size * info.dtype.itemsize for info in infos.values())

    def content(name: str) -> np.ndarray:
        return (rng.standard_normal(infos[name].shape, np.float32) * 0.02).astype(infos[name].dtype)

    write_shards(folder, infos, content, -(-total // shards))
    write_json(folder / "config.json", config.to_huggingface())


def bench_load(directory: Path) -> dict[str, Any]:
    """Loads the parameters in a fresh process.

    Returns ``load_seconds`` and, in bytes: ``parameter_bytes``, ``largest_parameter_bytes`` (of one stacked parameter),
    ``bare_bytes`` (the process before it loads), ``peak_memory_bytes``, and ``bound_bytes``: the bare process, the
    parameters, and twice the largest.

    Raises:
      LmxError: the process failed.
    """
    run = subprocess.run([sys.executable, "-m", __name__, str(directory)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise LmxError(f"loading {directory} failed: {run.stderr.strip().splitlines()[-1]}")
    return cast(dict[str, Any], json.loads(run.stdout))


def _measure(directory: Path) -> dict[str, Any]:
    jax.block_until_ready(jnp.ones(8) + 1)
    bare, began = _highest(), time.perf_counter()
    checkpoint = open_directory(directory)
    params = jax.block_until_ready(import_params(checkpoint.config, checkpoint.tensors))
    seconds = time.perf_counter() - began
    sizes = [a.nbytes for a in jax.tree.leaves(params)]
    return {
        "load_seconds": seconds,
        "parameter_bytes": sum(sizes),
        "largest_parameter_bytes": max(sizes),
        "bare_bytes": bare,
        "peak_memory_bytes": _highest(),
        "bound_bytes": bare + sum(sizes) + 2 * max(sizes),
    }


def _highest() -> int:
    """The most memory of this process alone, where the system says so: getrusage counts what its parent had."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    from lmx.kernels.roofline import peak_memory_bytes

    return peak_memory_bytes()


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]))))
