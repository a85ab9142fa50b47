"""``lmx check mesh``, ``faults`` and ``cluster``: a run is the same on any mesh, after any crash, on any hosts."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmx.errors import UserError

if TYPE_CHECKING:
    from lmx.train.check_faults import FaultCheck
    from lmx.train.check_mesh import MeshCheck, Trial

USAGE = """usage: lmx check mesh RECIPE [--devices N] ...   the same numbers on every mesh
       lmx check faults [--runs 20] ...          the same run after every crash
       lmx check cluster [--directory DIR] ...   whether the processes of a job can work together

each has --help with an example, as: lmx check mesh configs/quickstart.py --devices 8
"""


@dataclass(frozen=True)
class Mesh:
    """Takes a few real steps of a recipe, from one start, on one device and on each mesh, and compares them.

    The rows are random tokens, packed as real ones are, so nothing has to be prepared. A large recipe can be
    made small: every field of the recipe is an option. Fails if a loss, a gradient norm or the gradient of a
    parameter differs by more than rounding.

    Example: lmx check mesh configs/llama.py:llama_1b --devices 8 --mesh data=2,fsdp=4 --model.layers 2
    """

    devices: int = 0
    """Virtual CPU devices to use; 0 uses the real ones of this machine."""
    steps: int = 2
    """Steps to take."""
    mesh: tuple[str, ...] = ()
    """Meshes to try, each as data=2,fsdp=4 (the other axes are 1); all that take every device by default."""
    json: str = ""
    """Also write the result as JSON to this file; "-" is standard output."""


@dataclass(frozen=True)
class Faults:
    """Trains a tiny run in peace, and once more while it is killed again and again, and compares the two.

    It is killed (kill -9) at random steps, half of the times while a checkpoint is written; some restarts
    find their newest checkpoint truncated, or with one bit flipped; a SIGTERM and a SIGINT come on top. Every
    restart must go on from the newest good checkpoint, and in the end the parameters, the optimizer's state
    and the losses must be equal bit for bit. Runs on the CPU, in a temporary directory.

    Example: lmx check faults --runs 20 --seed 1
    """

    runs: int = 20
    """How often it is killed."""
    seed: int = 0
    """Seeds where it is killed and what is damaged."""
    steps: int = 300
    """Steps of the run."""
    json: str = ""
    """Also write the result as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx check`` with these arguments.

    Raises:
      UserError: there is no such check, or its arguments are wrong.
      LmxError: the check failed.
    """
    from lmx.cli import cluster

    checks = {"mesh": _mesh, "faults": _faults, "cluster": cluster.main}
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE, end="")
    elif name in checks:
        checks[name](rest)
    else:
        raise UserError(f"there is no check {name!r}; the checks are {', '.join(checks)}")


def _mesh(argv: Sequence[str]) -> None:
    from lmx.cli.recipes import parse, print_result
    from lmx.cli.runtime import start_jax

    options, recipe = parse("check mesh", Mesh, argv)
    meshes = [parse_mesh(text) for text in options.mesh]
    _use_virtual_devices(options.devices)
    start_jax()
    from lmx.train.check_mesh import check_mesh

    with _progress() as say:
        checked = check_mesh(recipe.experiment, meshes, options.steps, say)
    print_result(checked.data(), _mesh_table(checked), options.json)
    checked.verify()


def _faults(argv: Sequence[str]) -> None:
    import tyro

    options = tyro.cli(Faults, prog="lmx check faults", args=list(argv))
    import jax

    from lmx.cli.recipes import print_result
    from lmx.train.check_faults import check_faults, random_faults

    faults = random_faults(options.runs, options.steps, options.seed)
    jax.config.update("jax_platforms", "cpu")  # as the runs do: this process only compares what they leave
    with _progress() as say:
        checked = check_faults(faults, options.steps, options.seed, say)
    print_result(checked.data(), _faults_table(checked), options.json)
    checked.verify()


def parse_mesh(text: str) -> Any:
    """The mesh written as ``data=2,fsdp=4``; axes that are not named are 1.

    Raises:
      UserError: it is not written so.
    """
    from dataclasses import fields

    from lmx.sharding.mesh import MeshConfig

    axes = {f.name: 1 for f in fields(MeshConfig)}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in axes or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh {text}: {part!r} is no axis and its size; write it as data=2,fsdp=4")
        axes[name] = int(size)
    return MeshConfig(**axes)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows what is going on: a spinner on a terminal, lines elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:
        yield status.update if console.is_terminal else console.print


def _use_virtual_devices(count: int) -> None:
    """Splits the CPU into ``count`` devices; must come before JAX has looked for devices."""
    import jax

    if count < 0:
        raise UserError(f"--devices is {count}, expected a number of virtual CPU devices, or 0 for real ones")
    if count:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)


def _mesh_table(checked: "MeshCheck") -> str:
    from rich.table import Table

    from lmx.train.check_mesh import mesh_name

    table = Table()
    table.add_column("mesh", no_wrap=True)
    for name in ("loss", "gradient norm", "loss ±", "gradient norm ±", "gradients ±", "parameters ±", "MB"):
        table.add_column(name, justify="right")
    for trial in checked.trials:
        table.add_row(mesh_name(trial.mesh), *(_cells(trial) if not trial.skipped else ["skipped"]))
    skipped = [f"skipped {mesh_name(t.mesh)}: {t.skipped}" for t in checked.trials if t.skipped]
    pipelines = [f"{mesh_name(t.mesh)}: {t.pipeline}" for t in checked.trials if t.pipeline]
    verdict = checked.failure() or f"the same on every mesh, up to rounding ({checked.tolerance:.0e})"
    legend = (
        f"after {checked.steps} steps; ±: the largest difference from one device, relative (gradients: of "
        "any parameter), of parameters absolute; MB: on each device"
    )
    return "\n".join([_text(table), legend, *pipelines, *skipped, verdict])


def _cells(trial: "Trial") -> list[str]:
    differences = (
        trial.loss_difference,
        trial.grad_norm_difference,
        trial.gradient_difference,
        trial.param_difference,
    )
    return [
        f"{trial.loss[-1]:.6f}",
        f"{trial.grad_norm[-1]:.6f}",
        *(f"{d:.1e}" for d in differences),
        f"{trial.memory_bytes_per_device / 1e6:,.1f}",
    ]


def _faults_table(checked: "FaultCheck") -> str:
    from rich.table import Table

    table = Table()
    for name in ("signal", "after step", "while saving", "exit code", "resumed from"):
        table.add_column(name, justify="right")
    table.add_column("damage before the restart")
    for row in checked.outcomes:
        saving = "yes" if row.while_saving else ""
        table.add_row(row.signal, str(row.step), saving, str(row.exit_code), str(row.resumed), row.damage)
    return f"{_text(table)}\n{checked.verdict()}"


def _text(table: Any) -> str:
    """A table as text, as wide as it needs where the output is no terminal."""
    from rich.console import Console

    console = Console()
    width = console.width if console.is_terminal else 160
    out = Console(file=io.StringIO(), width=width)
    out.print(table)
    return str(out.file.getvalue()).rstrip()  # type: ignore[attr-defined]
