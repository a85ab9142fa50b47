"""Where the time of runs went, and which process had how much of its own: two sections of a page."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from lmx.report.curves import COLORS
from lmx.report.goodput import KINDS, STEPS
from lmx.report.runs import Run

# Steps that count stand out; the rest in the other hues.
_HUES = dict(zip(KINDS, (COLORS[2], *COLORS[:2], *COLORS[3:], "#9a9a9a"), strict=True))
_PROCESSES = 16


def goodput(runs: Sequence[Run], section: Callable[[str, str], str]) -> str:
    """A stacked bar for each run, with what its parts are."""
    bars = "".join(_bar(run, len(runs) > 1) for run in runs if run.goodput)
    return section("Where the time went", bars) if bars else ""


def _bar(run: Run, named: bool) -> str:
    found = run.goodput
    assert found is not None
    parts = [(kind, seconds) for kind, seconds in found.seconds.items() if seconds]
    shares = {kind: seconds / found.wall for kind, seconds in parts}
    bar = "".join(
        f'<span style="width:{shares[kind]:.3%};background:{_HUES[kind]}" title="{KINDS[kind]}"></span>'
        for kind, _ in parts
    )
    keys = "".join(
        f'<li><span class="dot" style="background:{_HUES[kind]}"></span>{KINDS[kind]} {shares[kind]:.1%} '
        f"<small>{seconds:,.1f} s</small></li>"
        for kind, seconds in parts
    )
    note = (
        f"{found.share:.1%} of {found.wall:,.0f} s in {KINDS[STEPS]} that count, "
        f"{found.attempts} attempt{'s' if found.attempts > 1 else ''}."
    )
    name = f"<h3>{escape(run.name)}</h3>" if named else ""
    return f'{name}<p class="note">{note}</p><div class="bar">{bar}</div><ul class="legend">{keys}</ul>'


def hosts(runs: Sequence[Run], section: Callable[[str, str], str]) -> str:
    """For each run of several processes, the own time of the slowest of them."""
    tables = "".join(
        f"{f'<h3>{escape(run.name)}</h3>' if len(runs) > 1 else ''}{_table(run.hosts)}" for run in runs if run.hosts
    )
    note = (
        "A process's own time is what it spends of a step before it waits for the devices, and so for the others: "
        "data, dispatch, logging. Seconds, over the log intervals."
    )
    return section("Time of each process", f'<p class="note">{note}</p>{tables}') if tables else ""


def _table(lines: Sequence[dict[str, Any]]) -> str:
    own: dict[str, list[float]] = {}
    for line in lines:
        for name, seconds in line["own_seconds"].items():
            own.setdefault(name, []).append(float(seconds))
    ranked = sorted(own.items(), key=lambda item: -float(np.mean(item[1])))[:_PROCESSES]
    step = float(np.mean([line["step_seconds"] for line in lines]))
    rows = "".join(
        f"<tr><th>process {escape(name)}</th>"
        + "".join(f"<td>{value:.4f}</td>" for value in (np.mean(times), np.max(times)))
        + f"<td>{float(np.mean(times)) / step:.0%}</td></tr>"
        for name, times in ranked
    )
    head = "<tr><th></th><th>mean</th><th>longest</th><th>of a step</th></tr>"
    return f'<div class="wide"><table>{head}{rows}</table></div>'
