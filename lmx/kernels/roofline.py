"""What this device reaches at best, measured: the yardsticks that benchmarks and progress lines are held against."""

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp


def median_seconds(function: Callable[..., Any], *arguments: Any, repeats: int = 5) -> float:
    """The median wall time in seconds of a jitted call, after one call that compiles it."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_flops_per_second(dtype: str, repeats: int = 5) -> float:
    """Floating-point operations per second of a square matrix product on one device, of a size that keeps it busy for
    long enough to be measured: 2048 on CPU, 8192 elsewhere."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    return 2 * size**3 / median_seconds(jax.jit(jnp.matmul), a, a, repeats=repeats)


def memory_bytes_per_second(megabytes: int = 512) -> float:
    """Bytes read per second by a sum over a float32 array that no cache holds, on one device."""
    a = jnp.ones((megabytes * 2**18,), jnp.float32)
    return megabytes * 2**20 / median_seconds(jax.jit(jnp.sum), a)


@functools.cache
def known_matmul_flops_per_second(dtype: str) -> float:
    """As :func:`matmul_flops_per_second`, but measured only once in a process, and in half the time."""
    return matmul_flops_per_second(dtype, repeats=2)


def side_by_side(devices: Iterable[jax.Device]) -> int:
    """How many of these devices' peaks add up: the CPU devices of a process share its cores."""
    return len({device.process_index if device.platform == "cpu" else device for device in devices})


def peak_memory_bytes() -> int:
    """The most memory in use so far: of the first device where it says so, else of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
