"""A recipe's train step compiled ahead of time, for devices that are not there."""

import importlib.metadata
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from lmx.errors import LmxError, UserError
from lmx.experiment import Experiment
from lmx.objectives.random_rows import full_rows
from lmx.sharding.collectives import Collective, collectives
from lmx.sharding.mesh import build_mesh
from lmx.sharding.rules import Sharding
from lmx.train.state import state_shapes
from lmx.train.step import jit_step

TOO_LARGE = "RESOURCE_EXHAUSTED"
"""What a compiler's error begins with when a program needs more memory than its devices have."""


@dataclass(frozen=True)
class CompiledStep:
    """A train step as it would run.

    Attributes:
      devices: how many.
      kind: of them, as the platform names it.
      mesh: the axes' sizes.
      trace_seconds: from Python to the compiler's input.
      compile_seconds: of the compiler.
      state_bytes: of parameters, optimizer and batch, on one device.
      working_bytes: of everything else at its most, on one device.
      collectives: what one device sends in a step.
    """

    devices: int
    kind: str
    mesh: dict[str, int]
    trace_seconds: float
    compile_seconds: float
    state_bytes: int
    working_bytes: int
    collectives: tuple[Collective, ...]

    def data(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self)


def sharding_on(experiment: Experiment, devices: Sequence[jax.Device]) -> Sharding:
    """The experiment's mesh and rules on these devices, which need not exist.

    Raises:
      UserError: the mesh does not fit them.
    """
    return Sharding(build_mesh(experiment.mesh, devices), experiment.rules)


def compile_step(experiment: Experiment, sharding: Sharding, effort: float = 0.0) -> CompiledStep:
    """Compiles a step of ``experiment`` for the devices of a mesh; ``effort`` of the compiler is from -1 to 1.

    Raises:
      UserError: the mesh does not fit the model or the batch, or a step not into the memory of the devices.
      LmxError: the compiler's program cannot be read back.
    """
    experiment.check()
    start = time.perf_counter()
    lowered = jit_step(experiment, sharding).lower(state_shapes(experiment), batch_shapes(experiment))
    traced = time.perf_counter()
    # Compilers for CPU do not know these options.
    efforts = {"exec_time_optimization_effort": effort, "memory_fitting_effort": effort} if effort else None
    compiled = _compiled(lowered, efforts)
    done = time.perf_counter()
    stats = compiled.memory_analysis()
    return CompiledStep(
        devices=math.prod(sharding.mesh.shape.values()),
        kind=sharding.mesh.devices.flat[0].device_kind,
        mesh=dict(sharding.mesh.shape),
        trace_seconds=traced - start,
        compile_seconds=done - traced,
        state_bytes=stats.argument_size_in_bytes,
        working_bytes=stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes,
        collectives=tuple(collectives(_text(compiled), sharding.mesh.shape)),
    )


def _compiled(lowered: Any, efforts: dict[str, float] | None) -> Any:
    try:
        return lowered.compile(efforts)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).partition(TOO_LARGE)[2].partition("\n")[0]
        if not said:
            raise
        raise UserError(
            f"a step does not fit into the devices' memory ({said.strip(' :.')}): split it over more of them, lower "
            "--train.batch or --train.length, raise --train.accumulate, or set --train.remat full"
        ) from error


def batch_shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch, [batch, any] each."""
    train = experiment.train
    row = full_rows(experiment.objective, experiment.model.spec(), 1, train.length)
    return {name: jax.ShapeDtypeStruct((train.batch, *a.shape[1:]), a.dtype) for name, a in row.items()}


def _text(compiled: Any) -> str:
    try:
        return str(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")]
        raise LmxError(
            f"the compiled program cannot be read back: {' and '.join(versions)} do not go together; pip install "
            "'lmx[tpu]' brings those that do"
        ) from error
