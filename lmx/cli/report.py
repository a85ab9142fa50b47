"""``lmx report``: one HTML page about one run, or several compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmx.cli.output import OutputFile, PageFile, print_result


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
    out: PageFile = ""
    """The page to write; by default report.html beside what it is about."""
    json: OutputFile = ""
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
    page = write_report(arguments.runs, Path(arguments.out) if arguments.out else None)
    found = {str(run): read_goodput(run) for run in arguments.runs}
    goodput = {run: value.data() if value else None for run, value in found.items()}
    print_result({"report": str(page), "runs": list(goodput), "goodput": goodput}, str(page), arguments.json)


def _report_results(arguments: _Report) -> None:
    """The page that compares results of ``lmx eval``."""
    from lmx.report.results import compared, read_results, write_results

    results = read_results(arguments.runs)
    page = write_results(results, Path(arguments.out or "results.html"))
    data = {"report": str(page), "results": [str(path) for path in arguments.runs], "measures": compared(results)}
    print_result(data, str(page), arguments.json)
