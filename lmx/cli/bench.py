"""``lmx bench``: measure training or decoding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmx.errors import UserError

USAGE = """usage: lmx bench train RECIPE ...
       lmx bench decode MODEL|RECIPE ...

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
    json: str = "-"
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
    json: str = "-"
    """The file for the JSON object; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx bench`` with these arguments."""
    kinds = {"train": _train, "decode": _decode}
    if not argv or argv[0] not in kinds:
        if argv and argv[0] in ("-h", "--help"):
            print(USAGE)
            return
        raise UserError("say what to measure: lmx bench train RECIPE, or lmx bench decode MODEL|RECIPE")
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
    from lmx.cli.recipes import parse
    from lmx.cli.runtime import start_jax

    is_recipe = bool(argv) and (argv[0].partition(":")[0].endswith(".py") or argv[0].startswith("-"))
    if is_recipe or not argv:
        options, recipe = parse("bench decode", Decode, argv)
        start_jax()
        spec, params = _random_model(recipe.experiment)
    else:
        import tyro

        from lmx.decode.loaded import load

        options = tyro.cli(Decode, prog="lmx bench decode MODEL", args=list(argv[1:]))
        start_jax()
        generator = load(argv[0]).generator
        spec, params = generator.spec, generator.params
    from lmx.decode.benchmark import bench_decode

    result = bench_decode(
        spec,
        params,
        batch=options.batch,
        prompt_length=options.prompt_length,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
    )
    _emit(result, options.json)


def _random_model(experiment: Any) -> Any:
    import jax

    from lmx.models.model import cast_floats, init_params, unstack_layers

    spec = experiment.model.spec()
    make = jax.jit(lambda key: unstack_layers(spec, cast_floats(init_params(spec, key), experiment.train.compute)))
    return spec, make(jax.random.key(experiment.train.seed))


def _emit(result: dict[str, Any], file: str) -> None:
    from lmx.cli.recipes import print_result

    print_result(result, "", file or "-")
