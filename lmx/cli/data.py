"""``lmx data prepare|stats RECIPE``: prepares what a recipe trains on, and says what is in it."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lmx.cli.output import OutputFile, print_result

if TYPE_CHECKING:
    from lmx.data.prepare import Prepared

DESCRIPTION = """Prepares a recipe's documents, tokenizer, tokens and rows, all that training needs of them, and prints
what is in them and what becomes of examples that are longer than a row. Preparation goes on where it was interrupted.

Example: lmx data stats configs/quickstart.py --length 1024 --data.held-out 0.05
"""


@dataclass(frozen=True)
class DataCommand:
    """Options of ``lmx data``; what is not among them overrides the recipe."""

    action: Literal["prepare", "stats"]
    """Either word does the same: what is not prepared yet is, and the statistics are printed."""
    recipe: str
    """path/to/file.py or path/to/file.py:function."""
    length: int | None = None
    """Row length in place of train.length."""
    workers: int = 0
    """Processes that prepare; 0 is as many as the corpus is worth."""
    json: OutputFile = ""
    """File for the statistics as JSON; "-" is standard output."""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    import tyro

    command, overrides = tyro.cli(
        DataCommand,
        prog="lmx data",
        description=DESCRIPTION,
        args=argv,
        return_unknown_args=True,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    from lmx.cli.recipes import load_recipe
    from lmx.data.prepare import prepare

    recipe = load_recipe(command.recipe, overrides)
    length = recipe.train.length if command.length is None else command.length
    sized = replace(recipe, train=replace(recipe.train, length=length))
    prepared = prepare(sized.corpus, workers=command.workers, accept=sized.check_tokenizer)
    _report(prepared, prepared.stats(sized.layout(prepared.tokenizer)), command)
    return 0


def _report(prepared: "Prepared", stats: dict[str, Any], command: DataCommand) -> None:
    from lmx.cli.console import table_text

    people = [f"prepared in {prepared.root}, fingerprint {prepared.fingerprint}", table_text(_table(stats))]
    if classes := stats.get("classes"):
        people.append(f"{len(classes)} classes: {', '.join(classes)}")
    print_result(stats, "\n".join(people), command.json)


def _table(stats: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table()
    table.add_column("source")
    for name in stats["sources"]:
        table.add_column(name, justify="right")
    for key in dict.fromkeys(key for source in stats["sources"].values() for key in source):
        values = [source.get(key, 0) for source in stats["sources"].values()]
        table.add_row(key.replace("_", " "), *(f"{v:,}" if isinstance(v, int) else f"{v:.6g}" for v in values))
    return table
