"""Measures a recipe's train step: compilation, time and memory, beside what the device reaches in a matrix product."""

import statistics
import time
from typing import Any

import jax

from lmx.experiment import Experiment
from lmx.kernels.roofline import matmul_flops_per_second, peak_memory_bytes, side_by_side
from lmx.models.flops import parameter_count
from lmx.objectives.objective import Batch
from lmx.objectives.random_rows import full_rows, random_layout
from lmx.sharding.mesh import build_mesh
from lmx.sharding.rules import Sharding
from lmx.train.state import jit_init
from lmx.train.step import BATCH, jit_step


def random_batch(experiment: Experiment, sharding: Sharding) -> Batch:
    """Random tokens in the objective's layout, each row one document that fills it."""
    train = experiment.train
    arrays = full_rows(experiment.objective, experiment.model.spec(), train.batch, train.length)
    return jax.device_put(arrays, sharding.named(BATCH))


def bench_train(experiment: Experiment, steps: int) -> dict[str, Any]:
    """Runs ``steps`` steps after two that do not count; times are seconds, the median where there are several.

    ``fraction_of_peak`` is model FLOPs (:meth:`Experiment.train_flops_per_token`) over what a large matrix product
    (:func:`matmul_flops_per_second`) reaches in the same process, in the recipe's compute dtype, before and after.
    """
    experiment.check()
    train = experiment.train
    sharding = Sharding(build_mesh(experiment.mesh), experiment.rules)
    init = jit_init(experiment, sharding)  # says what does not fit
    peaks = [matmul_flops_per_second(train.compute)]
    state = init(jax.random.key(0))
    batch = random_batch(experiment, sharding)
    began = time.perf_counter()
    compiled = jit_step(experiment, sharding).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - began
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - began)
    peaks.append(matmul_flops_per_second(train.compute))
    seconds, tokens = statistics.median(times[2:]), train.batch * train.length
    layout = random_layout(experiment.objective, experiment.model.spec(), train.length)
    model_flops = tokens * experiment.train_flops_per_token(layout) / seconds
    peak = statistics.mean(peaks) * side_by_side(sharding.mesh.devices.flat)
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "matmul_flops_per_second": peak,
        "model_flops_per_second": model_flops,
        "fraction_of_peak": model_flops / peak,
        "parameters": parameter_count(experiment.model.spec()),
        "batch": train.batch,
        "length": train.length,
        "steps": steps,
        "dtype": train.compute,
        "device": jax.devices()[0].device_kind,
        "devices": sharding.mesh.size,
    }
