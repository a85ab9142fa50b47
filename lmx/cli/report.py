"""``lmx report``: one HTML page about one run, or several compared."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Report:
    """Writes one self-contained HTML page about a run, or about several compared, and prints its path.

    The page has the curves, the configuration (of several runs: what differs), the data statistics, the
    samples through training and the fingerprint.

    Example: lmx report runs/quickstart runs/wider --out compare.html
    """

    runs: tuple[Path, ...]
    """Directories of the runs; the first gets the first colour."""
    out: Path | None = None
    """The page to write; by default report.html beside what it is about."""
    json: Path | None = None
    """Also write the page's path and the runs as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``lmx report`` with these arguments.

    Raises:
      UserError: a directory holds no run, or matplotlib is not installed.
    """
    import tyro

    from lmx.report.page import write_report

    positional = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
    arguments = tyro.cli(positional(_Report), prog="lmx report", args=argv)
    page = write_report(arguments.runs, arguments.out)
    result = json.dumps({"report": str(page), "runs": [str(r) for r in arguments.runs]}, indent=2)
    if arguments.json == Path("-"):
        sys.stdout.write(f"{result}\n")
        return
    if arguments.json is not None:
        arguments.json.write_text(f"{result}\n", encoding="utf-8")
    print(page)
