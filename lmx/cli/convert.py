"""``lmx convert``: from one kind of model directory to another."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro

from lmx.cli.output import OutputFile, print_result


@dataclass(frozen=True)
class Convert:
    """Writes a model as a Hugging Face directory, which transformers reads, or as one of lmx; and proves that it is the
    same model: every tensor is read back and compared, and so are the logits of random tokens.

    Example: lmx convert runs/quickstart exported --to hf --dtype bfloat16
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A run directory, a Hugging Face directory, or one that lmx convert made."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The directory to write: new or empty."""
    to: Literal["hf", "lmx", "peft"]
    """A Hugging Face directory, or one of lmx (an adapter is merged into its model); or of a run with an adapter that
    alone, for Hugging Face's PEFT."""
    dtype: str | None = None
    """float32, bfloat16 or float16; None keeps the source's."""
    step: int | None = None
    """Of a run: the checkpoint's step; None is the newest good one."""
    json: OutputFile = ""
    """Also write what was done as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx convert`` with these arguments."""
    options = tyro.cli(Convert, prog="lmx convert", args=list(argv))
    from pathlib import Path

    from rich.console import Console

    from lmx.decode.convert import convert

    source, target = Path(options.source), Path(options.target)
    console = Console(stderr=True)
    with console.status("") as status:

        def told(stage: str) -> None:
            status.update(stage)
            if not console.is_terminal:
                console.print(stage, highlight=False)

        result = convert(source, target, options.to, dtype=options.dtype, step=options.step, told=told)
    kinds = ", ".join(f"{count:,} {name}" for name, count in result.dtypes.items())
    compared = ", ".join(f"{name} within {most:.1g}" for name, most in result.compared.items())
    people = f"{result.directory}: {result.family}, {kinds} numbers; read back: every tensor the same, {compared}"
    print_result(asdict(result), people, options.json)
