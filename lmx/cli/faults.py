"""``lmx check faults``: a run is the same after every crash."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmx.cli.output import OutputFile, print_result
from lmx.errors import UserError

if TYPE_CHECKING:
    from lmx.train.check_faults import FaultCheck


@dataclass(frozen=True)
class Faults:
    """Trains a tiny run in peace, and once more while it is disturbed again and again, and compares the two.

    At random moments, checkpoint writes included, a random process is killed (kill -9), stopped, or told to end
    (SIGTERM, SIGINT), or the disk becomes full; some restarts find their newest checkpoint truncated, or with one bit
    flipped. Every job must end in time, every restart go on from the newest good checkpoint, and in the end the
    parameters, the optimizer's state and the losses must be equal bit for bit. Runs on the CPU, in a temporary
    directory.

    Example: lmx check faults --processes 2 --faults 50 --seed 1
    """

    processes: int = 1
    """Processes of the job, of one virtual device each."""
    faults: int = 20
    """How often it is disturbed."""
    seed: int = 0
    """Seeds where it is disturbed and what is damaged."""
    steps: int = 300
    """Steps of the run."""
    json: OutputFile = ""
    """Also write the result as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx check faults`` with these arguments.

    Raises:
      UserError: its arguments are wrong.
      LmxError: the check failed.
    """
    import tyro

    options = tyro.cli(Faults, prog="lmx check faults", args=list(argv))
    if options.processes < 1:
        raise UserError(f"--processes is {options.processes}, expected at least 1")
    import jax

    from lmx.cli.console import progress
    from lmx.train.check_faults import check_faults, random_faults

    faults = random_faults(options.faults, options.steps, options.seed)
    jax.config.update("jax_platforms", "cpu")  # as the runs do: this process only compares what they leave
    with progress() as say:
        checked = check_faults(faults, options.steps, options.processes, options.seed, say)
    print_result(checked.data(), describe(checked), options.json)
    checked.verify()


def describe(checked: "FaultCheck") -> str:
    """The faults as a table, and the verdict."""
    from rich.table import Table

    from lmx.cli.console import table_text

    table = Table()
    for name in ("fault", "while", "process", "after step", "exit code", "ended in", "resumed from"):
        table.add_column(name, justify="right")
    table.add_column("damage before the restart")
    for row in checked.outcomes:
        numbers = (row.process, row.step, row.exit_code, f"{row.seconds:.1f} s", row.resumed)
        table.add_row(row.kind, row.moment, *map(str, numbers), row.damage)
    return f"{table_text(table)}\n{checked.verdict()}"
