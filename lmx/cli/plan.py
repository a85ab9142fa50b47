"""``lmx plan RECIPE``: what a recipe would need on devices that are not there."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lmx.cli.output import OutputFile, print_result
from lmx.errors import UserError

if TYPE_CHECKING:
    from lmx.plan.communication import Compared
    from lmx.plan.compile import CompiledStep


@dataclass(frozen=True)
class Plan:
    """Compiles a recipe's train step for a TPU slice without having one: memory, communication, time to compile.

    Every field of the recipe is an option; --mesh says how the devices are used. TPUs take libtpu (the extra lmx[tpu]).

    Example: lmx plan configs/llama.py:llama_1b --topology v5p:2x2x2 --mesh.fsdp 8 --train.batch 64 --formulas True
    """

    topology: str = "v5p:2x2x2"
    """The devices: a kind of TPU and how many chips lie in each direction (v5p:4x4x4, v5e:4x4), or virtual CPU devices
    (cpu:8)."""
    slices: int = 0
    """How many such slices the data-centre network connects; 0: as many as mesh.slice."""
    formulas: bool = False
    """Beside what the compiled step sends, what it should send by the formula of each kind of parallelism."""
    effort: float = 0.0
    """How hard the compiler tries, from -1 (a third of the time, programs that run slower) to 1."""
    json: OutputFile = ""
    """Also write the result as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx plan`` with these arguments.

    Raises:
      UserError: the topology is unknown, or the mesh does not fit it.
    """
    from lmx.cli.recipes import parse

    options, recipe = parse("plan", Plan, argv)
    experiment = recipe.experiment
    if not -1 <= options.effort <= 1:
        raise UserError(f"--effort is {options.effort}, expected a number from -1 to 1")
    slices = options.slices or experiment.mesh.slice
    _without_devices(options.topology, slices)
    from lmx.plan.communication import compared, expected
    from lmx.plan.compile import compile_step, sharding_on
    from lmx.plan.topologies import topology_devices
    from lmx.sharding.collectives import bytes_by_axes

    sharding = sharding_on(experiment, topology_devices(options.topology, slices))
    terms = expected(experiment, sharding) if options.formulas else ()
    step = compile_step(experiment, sharding, options.effort)
    rows = compared(bytes_by_axes(step.collectives), terms)
    result = {
        "topology": options.topology,
        "slices": slices,
        **step.data(),
        "communication": [asdict(row) for row in rows],
    }
    print_result(result, f"{_heading(options, slices, step)}\n{_table(step, rows)}", options.json)


def _without_devices(topology: str, slices: int) -> None:
    """This process computes nothing: it takes no accelerator, and as many virtual CPU devices as are asked for."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    kind, _, count = topology.partition(":")
    if kind == "cpu" and count.isdecimal() and int(count):
        # Where devices have been looked for already, topology_devices says whether they are enough.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", int(count) * slices)


def _heading(options: Plan, slices: int, step: "CompiledStep") -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in step.mesh.items() if size > 1) or "one device"
    return (
        f"{step.devices} x {step.kind} ({f'{slices} of ' if slices > 1 else ''}{options.topology}), {mesh}\n"
        f"memory of a device  {_size(step.state_bytes)} of state and batch, {_size(step.working_bytes)} to work\n"
        f"compilation         {step.compile_seconds:.1f} s, after {step.trace_seconds:.1f} s of tracing\n"
        "what one device sends in a step:"
    )


def _table(step: "CompiledStep", rows: Sequence["Compared"]) -> str:
    from rich.table import Table

    from lmx.cli.console import table_text

    table = Table()
    for name in ("along", "sent", "by formula", "ratio", "of what", "by"):
        table.add_column(name, justify="right" if name in ("sent", "by formula", "ratio") else "left")
    for row in rows:
        kinds = sorted({c.kind for c in step.collectives if "+".join(c.axes) == row.axes})
        ratio = f"{row.measured / row.formula:.2f}" if row.formula else ""
        formula = _size(row.formula) if row.formula else ""
        table.add_row(row.axes, _size(row.measured), formula, ratio, row.what, ", ".join(kinds))
    return table_text(table)


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.2f} MiB"
