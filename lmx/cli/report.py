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

    Of results of lmx eval (.json), it compares the measures with their standard errors.

    Example: lmx report runs/quickstart runs/wider --out compare.html
    """

    runs: tuple[Path, ...]
    """Directories of the runs, or JSON files that lmx eval wrote; the first gets the first colour."""
    out: Path | None = None
    """The page to write; by default report.html beside what it is about."""
    json: Path | None = None
    """Also write the page's path, the runs and their goodput as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``lmx report`` with these arguments.

    Raises:
      UserError: a directory holds no run, or matplotlib is not installed.
    """
    import tyro

    from lmx.report.goodput import read_goodput
    from lmx.report.page import write_report

    positional = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
    arguments = tyro.cli(positional(_Report), prog="lmx report", args=argv)
    if any(path.suffix == ".json" for path in arguments.runs):
        _report_results(arguments)
        return
    page = write_report(arguments.runs, arguments.out)
    found = {str(run): read_goodput(run) for run in arguments.runs}
    goodput = {run: value.data() if value else None for run, value in found.items()}
    result = json.dumps({"report": str(page), "runs": list(goodput), "goodput": goodput}, indent=2)
    if arguments.json == Path("-"):
        sys.stdout.write(f"{result}\n")
        return
    if arguments.json is not None:
        arguments.json.write_text(f"{result}\n", encoding="utf-8")
    print(page)


def _report_results(arguments: _Report) -> None:
    """The page that compares results of ``lmx eval``."""
    from lmx.cli.recipes import print_result
    from lmx.report.results import compared, read_results, write_results

    results = read_results(arguments.runs)
    page = write_results(results, arguments.out or Path("results.html"))
    data = {"report": str(page), "results": [str(path) for path in arguments.runs], "measures": compared(results)}
    print_result(data, str(page), str(arguments.json or ""))
