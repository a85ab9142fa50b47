"""``lmx model``: a model's parameters, where they lie, and what a token costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lmx.cli.output import OutputFile, print_result
from lmx.errors import UserError

if TYPE_CHECKING:
    from lmx.experiment import Experiment
    from lmx.models.config import ModelConfig
    from lmx.models.summary import Kept, Parameter, Summary
    from lmx.sharding.rules import Sharding

Dtype = Literal["float32", "bfloat16", "float16"]
COUNTS, FLOPS, BYTES = " K M B T", " k M G T P", " B, KiB, MiB, GiB, TiB, PiB"


@dataclass(frozen=True)
class Show:
    """Shows a model without making it: parameters, axes, shardings, bytes, FLOPs per token, the cache of decoding.

    MODEL is a recipe, a run directory, a Hugging Face directory, or the name of a published size (deepseek_v3). For a
    recipe, every field of it is an option; for the others, those of the mesh and the rules. No device of the mesh is
    needed. Example: lmx model configs/llama.py:llama_70b --mesh.fsdp 8 --depth 4
    """

    length: int = 0
    """Tokens in the rows that FLOPs are a mean over; 0: the run's train.length, a Hugging Face model's context."""
    depth: int = 0
    """Levels of the tree to show; 0 for all."""
    dtype: Dtype = "bfloat16"
    """Dtype of the cache that decoding keeps."""
    param_dtype: Dtype | None = None
    """Dtype of the parameters; None: float32 for a recipe or a run, what config.json says for a Hugging Face model."""
    devices: int = 0
    """Devices of the mesh; 0: as many as its axes ask for, an axis of -1 ("the rest") being 1, of -8 ("up to 8") 8."""
    json: OutputFile = ""
    """Write the same as JSON to this file; "-" is standard output."""


@dataclass(frozen=True)
class Shown:
    """What is shown: a name, an experiment that has the model, the rows' length, and the parameters' dtype."""

    name: str
    experiment: Experiment
    length: int
    dtype: Dtype


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx model`` with these arguments."""
    import jax

    from lmx.cli.recipes import parse

    jax.config.update("jax_platforms", "cpu")  # shapes need no accelerator, and another process may hold it
    if not argv or argv[0].startswith("-") or argv[0].partition(":")[0].endswith(".py"):
        options, recipe = parse("model", Show, argv)
        shown = Shown(recipe.name, recipe.experiment, recipe.experiment.train.length, "float32")
    else:
        options, shown = _directory(Path(argv[0]), argv[1:])
    summary = _summary(shown, options)
    from lmx.models.summary import to_data

    dtypes = {"dtype": options.param_dtype or shown.dtype, "cache_dtype": options.dtype}
    data = {"model": shown.name, "family": shown.experiment.model.family, **dtypes, **to_data(summary)}
    print_result(data, "\n\n".join([tree(summary, options.depth), totals(data, summary)]), options.json)


def _directory(path: Path, argv: Sequence[str]) -> tuple[Show, Shown]:
    """The options and the model of a run directory or a Hugging Face directory."""
    from lmx.cli.recipes import Placement, parse_placed

    shown = _open(path)
    experiment = shown.experiment
    options, place = parse_placed("model DIR", Show, argv, Placement(experiment.mesh, experiment.rules))
    mesh, rules = place.mesh or experiment.mesh, place.rules or experiment.rules
    placed = dataclasses.replace(experiment, mesh=mesh, rules=rules)
    return options, dataclasses.replace(shown, experiment=placed)


def _open(path: Path) -> Shown:
    from lmx.checkpoint.huggingface import read_config
    from lmx.checkpoint.huggingface.tensors import read_json
    from lmx.config import nearest
    from lmx.decode.sources import MODEL, open_source
    from lmx.experiment import RunDir
    from lmx.models.families import presets

    run = RunDir(path)
    if run.experiment.exists():
        experiment = run.load_experiment()
        return Shown(path.name, experiment, experiment.train.length, "float32")
    if (path / MODEL).is_file():
        source = open_source(path)
        return _of_config(path.name, source.config, "float32")
    if not path.exists() and str(path) in presets():
        return _of_config(str(path), presets()[str(path)], "float32")
    if not (path / "config.json").is_file():
        nearby = ", ".join(nearest(str(path), presets()).split(", ")[:4])
        raise UserError(
            f"{path} is neither a recipe (file.py or file.py:function), nor a run directory (it has no "
            f"{run.experiment.name}), nor a Hugging Face directory (it has no config.json), nor one of the "
            f"{len(presets())} published sizes (the nearest: {nearby})"
        )
    config = read_json(path / "config.json")
    model, named = read_config(config), config.get("dtype") or config.get("torch_dtype")
    dtype = named if named in ("bfloat16", "float16") else "float32"
    return _of_config(path.name, model, cast(Dtype, dtype))


def _of_config(name: str, model: ModelConfig, dtype: Dtype) -> Shown:
    from lmx.experiment import Experiment, TrainConfig

    train = TrainConfig(length=min(TrainConfig().length, model.context))
    return Shown(name, Experiment(model=model, train=train), model.context, dtype)


def _summary(shown: Shown, options: Show) -> Summary:
    from lmx.models.summary import summarize

    spec, length = shown.experiment.model.spec(), options.length or shown.length
    if not 1 <= length <= spec.context:
        asked = "--length" if options.length else "train.length"
        raise UserError(f"{asked} is {length}, expected 1 to the model's context of {spec.context}: set --length")
    if options.depth < 0:
        raise UserError(f"--depth is {options.depth}, expected a number of levels, or 0 for all")
    return summarize(
        spec,
        length,
        sharding=_sharding(shown.experiment, options.devices),
        dtype=options.param_dtype or shown.dtype,
        cache=options.dtype,
    )


def _sharding(experiment: Experiment, devices: int) -> Sharding:
    """The recipe's mesh by its shape alone."""
    import math

    from jax.sharding import AbstractMesh, AxisType

    from lmx.sharding.rules import Sharding

    if devices < 0:
        raise UserError(f"--devices is {devices}, expected a number of devices, or 0 for as many as the mesh asks for")
    fixed = math.prod(abs(size) for size in dataclasses.asdict(experiment.mesh).values())
    sizes = experiment.mesh.sizes(devices or fixed)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return Sharding(cast(Any, mesh), experiment.rules)


def tree(summary: Summary, depth: int = 0) -> str:
    """The tree of parameters as a table: a row for each, and for each branch its sums; ``depth`` 0 for all levels."""
    import io

    from rich.console import Console
    from rich.table import Table

    meshed = any(size > 1 for size in summary.mesh.values())
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("parameter", "shape, axis" + "/mesh axis" * meshed):
        table.add_column(name, no_wrap=True)
    for name in ("parameters", "bytes", *["a device"] * meshed, "FLOPs/token"):
        table.add_column(name, no_wrap=True, justify="right")
    for label, shape, part in _rows(summary, (), "", depth or 99):
        flops = part.weight_flops + part.score_flops
        amounts = [(part.count, COUNTS), (part.bytes, BYTES), *[(part.device_bytes, BYTES)] * meshed, (flops, FLOPS)]
        table.add_row(label, shape, *(scaled(number, units) if number else "-" for number, units in amounts))
    console = Console(file=io.StringIO(), width=250, highlight=False, markup=False, emoji=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in cast(io.StringIO, console.file).getvalue().splitlines())


def _rows(part: Summary, path: tuple[str, ...], indent: str, depth: int) -> Iterator[tuple[str, str, Summary]]:
    """Labels with the tree's lines, shapes, and what the numbers are of, below ``path``."""
    names = list(dict.fromkeys(p.weight.path[len(path)] for p in part.parameters))
    scores = [s for s in part.scores if s.path == path]
    for i, name in enumerate(names):
        last = i == len(names) - 1 and not scores
        below, here = part.below((*path, name)), (*path, name)
        leaf = len(below.parameters) == 1 and not below.scores
        here = below.parameters[0].weight.path if leaf else here
        label = indent + ("└─ " if last else "├─ ") + "/".join(here[len(path) :])
        yield label, _shape(below.parameters[0]) if leaf else _layers(below, here), below
        if not leaf and depth > 1:
            yield from _rows(below, here, indent + ("   " if last else "│  "), depth - 1)
    for score in scores:
        what = f"{score.positions:,.1f} positions seen on average"
        yield f"{indent}└─ scores", what, dataclasses.replace(part, parameters=(), scores=(score,))


def _shape(parameter: Parameter) -> str:
    weight = parameter.weight
    dims = zip(weight.shape, weight.axes, parameter.split, strict=True)
    return " x ".join(f"{size} {axis or ''}{''.join('/' + m for m in cut)}".strip() for size, axis, cut in dims)


def _layers(part: Summary, path: tuple[str, ...]) -> str:
    """Which layers a block stands for."""
    layers = part.parameters[0].weight.layers
    if layers is None or not path[-1].startswith("block_"):
        return ""
    every = f" in steps of {layers.step}" if layers.step > 1 else ""
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}{every}"


def totals(data: dict[str, Any], summary: Summary) -> str:
    """The sums for people, one a line."""
    flops, cut = data["flops_per_token"], [f"{axis} {n}" for axis, n in summary.mesh.items() if n > 1]
    lines = {
        "parameters": f"{scaled(summary.count, COUNTS)} ({summary.count:,}), {scaled(summary.bytes, BYTES)} in "
        f"{data['dtype']}",
        "active": f"{scaled(summary.active, COUNTS)} ({summary.active:,}) for one token",
        "mesh": f"{' x '.join(cut)}: {scaled(summary.device_bytes, BYTES)} on each of {data['devices']} devices",
        "forward": f"{scaled(flops['forward'], FLOPS)} FLOPs per token in rows of {summary.length}: weights "
        f"{scaled(flops['weights'], FLOPS)}, attention scores {scaled(flops['scores'], FLOPS)}",
        "training": f"{scaled(flops['train'], FLOPS)} FLOPs per token: 3 x forward, the causal half of the scores not "
        "taken off",
        "token": "one of the source and one of the target, in rows of the same length",
        "cache": _cache(data["cache_dtype"], summary),
    }
    sourced = any(p.weight.path[0] == "encoder" for p in summary.parameters)
    hidden = {"mesh": not cut, "active": summary.active == summary.count, "token": not sourced}
    return "\n".join(f"{name:12}{text}" for name, text in lines.items() if not hidden.get(name))


def _cache(dtype: str, summary: Summary) -> str:
    """What decoding keeps, first in all and then by kind."""
    if not summary.kept:
        return "none: positions see later ones"
    token, source = summary.cache_bytes(), summary.cache_bytes(memory=True)
    text = f"{scaled(token, BYTES)} per token in {dtype}, {scaled(summary.cache_row(), BYTES)} for {summary.length}"
    text += f"; {scaled(source, BYTES)} per source token" if source else ""
    return "\n".join([text, *(f"{'':12}{_kind(k)}" for k in summary.kept if k.most is not None)])


def _kind(kept: Kept) -> str:
    assert kept.most is not None
    each, whole = scaled(kept.bytes, BYTES), scaled(kept.row(kept.most), BYTES)
    return f"of that {each} in {kept.layers} layers that need at most {kept.most} positions ({whole})"


def scaled(number: float, units: str) -> str:
    """The number in the largest of the units that leaves it at least 1, as 671.0B; bytes go by 1024."""
    names = units.split(",") if "," in units else units.split(" ")
    base, power = 1024 if "," in units else 1000, 0
    while number >= base and power < len(names) - 1:
        number, power = number / base, power + 1
    return f"{number:.1f}{names[power]}" if power or number % 1 else f"{number:.0f}{names[power]}"
