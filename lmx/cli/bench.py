"""``lmx bench``: measure training, decoding or loading."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from lmx.cli.output import OutputFile, print_result
from lmx.errors import UserError

USAGE = """usage: lmx bench train RECIPE ...
       lmx bench decode MODEL|RECIPE ...
       lmx bench load DIR|SIZE ...

Each has --help. Example: lmx bench train configs/gpt2.py:gpt2_124m --batch 4 --length 512 --steps 10"""


@dataclass(frozen=True)
class Train:
    """Measures the train step of a recipe on random tokens, and prints one JSON object.

    Example: lmx bench train configs/gpt2.py:gpt2_124m --batch 4 --length 512 --steps 10
    """

    batch: int = 0
    """Sequences in a step; 0 is the recipe's."""
    length: int = 0
    """Tokens in a sequence; 0 is the recipe's."""
    steps: int = 10
    """Steps to measure; two more come first."""
    json: OutputFile = "-"
    """The file for the JSON object; "-" is standard output."""


@dataclass(frozen=True)
class Decode:
    """Measures greedy decoding of a run's model, or of a recipe's with random weights, and prints one JSON object.

    Example: lmx bench decode configs/gpt2.py:gpt2_124m --batch 1 --prompt-length 64 --new-tokens 128
    """

    batch: int = 1
    """Prompts at once."""
    prompt_length: int = 64
    """Tokens in a prompt."""
    new_tokens: int = 128
    """Tokens to write after each prompt."""
    repeats: int = 5
    """Calls to measure; one more comes first."""
    json: OutputFile = "-"
    """The file for the JSON object; "-" is standard output."""


@dataclass(frozen=True)
class Load:
    """Measures how long a Hugging Face directory takes to load and how much memory, and prints one JSON object.

    A published size (llama_3_2_1b) stands for a directory of random bfloat16 weights, which is made for the purpose.

    Example: lmx bench load llama_3_2_1b --shards 4
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR|SIZE")]
    """A Hugging Face directory, or the name of a published size."""
    shards: int = 4
    """Files of the directory that is made."""
    json: OutputFile = "-"
    """The file for the JSON object; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx bench`` with these arguments."""
    kinds = {"train": _train, "decode": _decode, "load": _load}
    if not argv or argv[0] not in kinds:
        if argv and argv[0] in ("-h", "--help"):
            print(USAGE)
            return
        raise UserError(
            "say what to measure: lmx bench train RECIPE, lmx bench decode MODEL|RECIPE, or lmx bench load DIR|SIZE"
        )
    kinds[argv[0]](argv[1:])


def _train(argv: Sequence[str]) -> None:
    from lmx.cli.recipes import parse
    from lmx.cli.runtime import start_jax

    options, recipe = parse("bench train", Train, argv)
    if options.steps < 1:
        raise UserError(f"--steps is {options.steps}, expected at least 1")
    start_jax()
    from lmx.train.benchmark import bench_train

    train = recipe.experiment.train
    train = replace(train, batch=options.batch or train.batch, length=options.length or train.length)
    _emit(bench_train(replace(recipe.experiment, train=train), options.steps), options.json)


def _decode(argv: Sequence[str]) -> None:
    from lmx.cli.recipes import parse, parse_placed
    from lmx.cli.runtime import load_placed, start_jax

    is_recipe = bool(argv) and (argv[0].partition(":")[0].endswith(".py") or argv[0].startswith("-"))
    if is_recipe or not argv:
        options, recipe = parse("bench decode", Decode, argv)
        start_jax()
        spec, params, places = _random_model(recipe.experiment)
    else:
        options, place = parse_placed("bench decode MODEL", Decode, argv[1:])
        start_jax()
        generator = load_placed(argv[0], place).generator
        spec, params, places = generator.spec, generator.params, generator.places
    from lmx.decode.benchmark import bench_decode

    result = bench_decode(
        spec,
        params,
        batch=options.batch,
        prompt_length=options.prompt_length,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        places=places,
    )
    _emit(result, options.json)


def _load(argv: Sequence[str]) -> None:
    import tempfile
    from pathlib import Path

    options = tyro.cli(Load, prog="lmx bench load", args=list(argv))
    from lmx.checkpoint.benchmark import bench_load, random_directory
    from lmx.models.families import presets

    if Path(options.model).exists() or options.model not in presets():
        _emit(bench_load(Path(options.model)), options.json)
        return
    if options.shards < 1:
        raise UserError(f"--shards is {options.shards}, expected at least 1")
    with tempfile.TemporaryDirectory() as folder:
        random_directory(presets()[options.model], Path(folder), shards=options.shards)
        _emit(bench_load(Path(folder)), options.json)


def _random_model(experiment: Any) -> Any:
    """The model's shape, random parameters in the form that decoding takes, and where they lie: on one device, unless
    the recipe or the command names a mesh."""
    import jax

    from lmx.decode.places import Places
    from lmx.models.model import cast_floats, init_params, unstack_layers, unstacked_param_axes
    from lmx.sharding.mesh import MeshConfig, build_mesh
    from lmx.sharding.rules import Sharding

    spec, key = experiment.model.spec(), jax.random.key(experiment.train.seed)

    def make(key: jax.Array) -> Any:
        return unstack_layers(spec, cast_floats(init_params(spec, key), experiment.train.compute))

    if experiment.mesh == MeshConfig():
        return spec, jax.jit(make)(key), None
    places = Places.of(Sharding(build_mesh(experiment.mesh), experiment.rules))
    axes = unstacked_param_axes(spec)
    places.writing.check_divides(axes, jax.eval_shape(make, key))
    return spec, jax.jit(make, out_shardings=places.writing.tree(axes))(key), places


def _emit(result: dict[str, Any], file: str) -> None:
    print_result(result, "", file or "-")
