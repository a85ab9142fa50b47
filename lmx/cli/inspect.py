"""``lmx inspect``: look inside of a model while it reads a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from lmx.cli.output import OutputFile, PageFile, print_result
from lmx.files import write_file


@dataclass(frozen=True)
class Inspect:
    """Writes one self-contained HTML page about a text and what a model makes of it, and prints its path.

    The page has each token's log-probability and rank, what each layer would predict (logit lens), the attention of
    every head, and which tokens a prediction rests on (gradient times input). An encoder predicts each token where that
    one is masked, or the [MASK] tokens of the text.

    Example: lmx inspect runs/quickstart --text "def main():" --out inside.html
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run directory, a Hugging Face directory, or one that lmx convert made."""
    text: str
    """What the model reads, up to 128 tokens."""
    target: str = ""
    """Of an encoder-decoder, or a decoder that learned to go on with a prefix, what it would write; by default what it
    does write."""
    out: PageFile = "inspect.html"
    """The page to write."""
    step: int | None = None
    """Of a run: the checkpoint's step; None is the newest good one."""
    json: OutputFile = ""
    """Also write all numbers as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx inspect`` with these arguments."""
    options = tyro.cli(Inspect, prog="lmx inspect", args=list(argv))
    from lmx.cli.runtime import start_jax

    start_jax()
    from lmx.decode.load import load
    from lmx.inspect.data import as_data
    from lmx.inspect.look import look
    from lmx.inspect.page import page

    model = load(options.model, step=options.step)
    seen = look(model, options.text, options.target)
    data = as_data(model, seen, options.model, options.text)
    write_file(options.out, page(data, seen))
    print_result(data, options.out, options.json)
