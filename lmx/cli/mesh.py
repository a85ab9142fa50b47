"""``lmx check mesh``: the same numbers on every mesh."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmx.cli.output import OutputFile, print_result
from lmx.errors import LmxError, UserError

if TYPE_CHECKING:
    from lmx.train.check_mesh import MeshCheck, Trial


@dataclass(frozen=True)
class Mesh:
    """Takes a few real steps of a recipe, from one start, on one device and on each mesh, and compares them.

    The rows are random tokens, packed as real ones are, so nothing has to be prepared. Several recipes may be named;
    a large one can be made small: every field of a recipe is an option. Fails if a loss, a gradient norm or the
    gradient of a parameter differs by more than rounding, or a parameter by more than 0.05 learning rates.

    Example: lmx check mesh configs/llama.py:llama_1b --devices 8 --mesh data=2,fsdp=4 --model.layers 2
    """

    devices: int = 0
    """Virtual CPU devices to use; 0 uses the real ones of this machine."""
    steps: int = 2
    """Steps to take."""
    mesh: tuple[str, ...] = ()
    """Meshes to try, each as data=2,fsdp=4 (the other axes are 1); by default that of --layout, else all over data,
    fsdp, stage, expert, sequence and tensor that take every device."""
    json: OutputFile = ""
    """Also write the result as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx check mesh`` with these arguments.

    Raises:
      UserError: a recipe, an override or a mesh is wrong.
      LmxError: the numbers differ.
    """
    from lmx.cli.console import progress
    from lmx.cli.recipes import parse

    count = next((i for i, arg in enumerate(argv) if arg.startswith("-")), len(argv))
    parsed = [parse("check mesh", Mesh, [recipe, *argv[count:]]) for recipe in argv[:count]]
    if not parsed:
        parsed = [parse("check mesh", Mesh, argv)]  # prints the help, or says that a recipe is missing
    names = [recipe.name for _, recipe in parsed]
    if len(set(names)) < len(names):
        raise UserError(f"two of the recipes have one name: {', '.join(names)}; give one of the functions another")
    options = parsed[0][0]
    meshes = [parse_mesh(text) for text in options.mesh]
    _use_virtual_devices(options.devices)
    from lmx.train.check_mesh import check_mesh  # without a compilation cache: nobody runs these programs again

    checked: dict[str, MeshCheck] = {}
    with progress() as say:
        for _, recipe in parsed:
            tell = lambda text, name=recipe.name: say(f"{name}: {text}")  # noqa: E731
            found = check_mesh(recipe.experiment, meshes or _own_mesh(recipe.experiment), options.steps, tell)
            checked[recipe.name] = found
            if options.json != "-":  # at once: the next one may take minutes
                print(_text(recipe.name, found), end="\n\n", flush=True)
    same = all(check.failure() is None for check in checked.values())
    data = {"same": same, "recipes": {name: check.data() for name, check in checked.items()}}
    print_result(data, f"{len(checked)} recipes, {'the same' if same else 'NOT the same'} on every mesh", options.json)
    failures = [f"{name}: {failure}" for name, check in checked.items() if (failure := check.failure())]
    if failures:
        raise LmxError("; ".join(failures))


def _own_mesh(experiment: Any) -> list[Any]:
    """The mesh that a layout or the recipe names, if one does."""
    import jax

    from lmx.sharding.mesh import MeshConfig

    mesh = experiment.mesh
    return [] if mesh == MeshConfig() else [MeshConfig(**mesh.sizes(jax.device_count()))]


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


def _use_virtual_devices(count: int) -> None:
    """Splits the CPU into ``count`` devices; must come before JAX has looked for devices."""
    import jax

    if count < 0:
        raise UserError(f"--devices is {count}, expected a number of virtual CPU devices, or 0 for real ones")
    if count:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)


def _text(name: str, checked: "MeshCheck") -> str:
    """The table of one recipe, and what is to be said about it."""
    from rich.table import Table

    from lmx.cli.console import table_text
    from lmx.train.check_mesh import PARAMETERS, mesh_name

    table = Table(title=name)
    table.add_column("mesh", no_wrap=True)
    for column in ("loss", "gradient norm", "loss ±", "norm ±", "gradients ±", "parameters ±", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("sent in a step, by mesh axis")
    tried = [trial for trial in checked.trials if not trial.skipped]
    for trial in tried:
        table.add_row(mesh_name(trial.mesh), *_cells(trial))
    skipped = [f"skipped {mesh_name(t.mesh)}: {t.skipped}" for t in checked.trials if t.skipped]
    pipelines = [f"{mesh_name(t.mesh)}: {t.pipeline}" for t in tried if t.pipeline]
    emptied = max(trial.emptied for trial in tried)
    ties = [f"left out for routers within rounding of a tie: up to {emptied} rows of a mesh's steps"] if emptied else []
    verdict = checked.failure() or (
        f"the same on {len(tried) - 1} meshes, up to rounding ({checked.tolerance:.0e}, of parameters {PARAMETERS})"
    )
    legend = (
        f"after {checked.steps} steps; ±: the largest difference from one device, relative (gradients: of any "
        "parameter), of parameters in learning rates; memory and sent: of each device"
    )
    return "\n".join([table_text(table), legend, *pipelines, *skipped, *ties, verdict])


def _cells(trial: "Trial") -> list[str]:
    from lmx.cli.model import BYTES, scaled

    differences = (
        trial.loss_difference,
        trial.grad_norm_difference,
        trial.gradient_difference,
        trial.param_difference,
    )
    sent = [f"{axes} {scaled(size, BYTES)}" for axes, size in trial.sent_bytes_per_device.items()]
    return [
        f"{trial.loss[-1]:.6f}",
        f"{trial.grad_norm[-1]:.6f}",
        *(f"{d:.1e}" for d in differences),
        scaled(trial.memory_bytes_per_device, BYTES),
        ", ".join(sent),
    ]
