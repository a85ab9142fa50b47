"""Results of ``lmx eval`` side by side: a table with standard errors, and a plot of each measure."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lmx import config
from lmx.errors import UserError
from lmx.eval.metrics.measure import HELD_OUT, SCORES
from lmx.files import write_file
from lmx.report import curves
from lmx.report.html import document, section


@dataclass(frozen=True)
class Result:
    """One file: its name, and by task and measure what it holds."""

    name: str
    measures: dict[tuple[str, str], dict[str, Any]]
    content: dict[str, Any]


def read_results(files: Sequence[Path]) -> list[Result]:
    """The results in JSON files, named by what tells them apart.

    Raises:
      UserError: a file that is not there, or holds no result of ``lmx eval``.
    """
    names = [file.stem for file in files]
    short = len(set(names)) == len(names)
    return [_read(file, file.stem if short else str(file)) for file in files]


def _read(file: Path, name: str) -> Result:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a result of lmx eval: {error}") from error
    found = _measures(content) if isinstance(content, dict) else {}
    if not found:
        raise UserError(f"{file} is no result of lmx eval: it has no measures; write one with lmx eval ... --json FILE")
    return Result(name, found, content)


def _measures(content: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    found = {
        (task, name): measure
        for task, result in content.get("tasks", {}).items()
        for name, measure in result.get("measures", {}).items()
    }
    return {**_plain(content), **found}


def _plain(content: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The scores that a result has by their names alone, without standard errors."""
    numbers = {name: content[name] for name in SCORES if isinstance(content.get(name), int | float)}
    plain = {"stderr": None, "n": content.get("targets", 0)}
    return {
        (HELD_OUT, name): {**plain, "value": value, "higher_is_better": SCORES[name]} for name, value in numbers.items()
    }


def compared(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For each measure its value and standard error in every result, and how far each is from the first: the
    difference, and its standard error as of independent samples (of results on the same examples it is smaller)."""
    keys = dict.fromkeys(key for result in results for key in result.measures)
    return [
        {"task": key[0], "measure": key[1], "higher_is_better": _better(results, key), "results": _cells(results, key)}
        for key in keys
    ]


def _better(results: Sequence[Result], key: tuple[str, str]) -> bool | None:
    """Whether a higher one is better; None where neither is, or nothing says."""
    return next((r.measures[key].get("higher_is_better") for r in results if key in r.measures), None)


def _cells(results: Sequence[Result], key: tuple[str, str]) -> list[dict[str, Any] | None]:
    first = results[0].measures.get(key)
    cells: list[dict[str, Any] | None] = []
    for result in results:
        own = result.measures.get(key)
        if own is None:
            cells.append(None)
            continue
        cell = {"result": result.name, "value": own["value"], "stderr": own["stderr"], "n": own["n"]}
        if first and own is not first and None not in (first["value"], own["value"]):
            cell["difference"] = own["value"] - first["value"]
            errors = (first["stderr"], own["stderr"])
            cell["difference_stderr"] = None if None in errors else math.hypot(*errors)
        cells.append(cell)
    return cells


def write_results(results: Sequence[Result], out: Path) -> Path:
    """Writes the page that compares results, and returns its path.

    Raises:
      UserError: matplotlib is not installed.
    """
    rows = compared(results)
    names = [result.name for result in results]
    title = " and ".join(names) if len(names) < 3 else f"{len(names)} results"
    note = (
        "Value and standard error; below it the difference from the first column, bold where it is more than two "
        "standard errors. They are taken as independent; on the same examples the difference is mostly surer than that."
    )
    plots = "".join(f"<figure>{_plot(row, names)}</figure>" for row in rows if any(row["results"]))
    body = (
        section("Measures", f'<p class="note">{note}</p>{_table(rows, names)}')
        + section("Plot", f'<p class="note">Bars are one standard error.</p><div class="grid">{plots}</div>')
        + _differences(results)
        + section("Commands", "".join(map(_command, results)))
    )
    write_file(out, document(title, body))
    return out


def _table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    head = "".join(f"<th>{_dot(i)}{escape(name)}</th>" for i, name in enumerate(names))
    lines = (
        f"<tr><th>{escape(row['task'])}</th><th>{escape(row['measure'])}</th>"
        + "".join(f"<td>{_cell(cell, row['higher_is_better'])}</td>" for cell in row["results"])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr><th></th><th></th>{head}</tr>{"".join(lines)}</table></div>'


def _cell(cell: dict[str, Any] | None, higher_is_better: bool | None) -> str:
    if cell is None or cell["value"] is None:
        return ""
    text = _with_error(cell["value"], cell["stderr"])
    if "difference" not in cell:
        return f"{text} <small>n {cell['n']:,}</small>"
    change, error = cell["difference"], cell["difference_stderr"]
    told = f"{change:+.4g}" + _plus_minus(error)
    if error is not None and abs(change) > 2 * error:
        verdict = "" if higher_is_better is None else " better" if (change > 0) == higher_is_better else " worse"
        told = f"<b>{told}{verdict}</b>"
    return f"{text} <small>n {cell['n']:,}</small><br><small>{told}</small>"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" + _plus_minus(error)


def _plus_minus(error: float | None) -> str:
    if error is None:
        return ""
    return f" &plusmn; {error:,.0f}" if error >= 100 else f" &plusmn; {error:.2g}"


def _dot(index: int) -> str:
    return f'<span class="dot" style="background:{curves.color(index)}"></span>'


def _plot(row: dict[str, Any], names: Sequence[str]) -> str:
    """One measure: a dot with a bar for each result."""

    def paint(axes: Any, matplotlib: Any) -> None:
        for index, cell in enumerate(row["results"]):
            if cell is not None and cell["value"] is not None:
                error = cell["stderr"] or 0.0
                axes.errorbar(cell["value"], -index, xerr=error, fmt="o", color=curves.color(index), capsize=3)
        axes.set_yticks([-i for i in range(len(names))], names)
        axes.set_ylim(0.6 - len(names), 0.6 - 0.2)
        axes.set_title(f"{row['task']}: {row['measure'].replace('_', ' ')}", loc="left")

    left = 0.25 + curves.LETTER * max(map(len, names))
    return curves.painted(f"{row['task']} {row['measure']}", paint, (5.4, 1.0 + 0.32 * len(names)), min(left, 4.0))


def _differences(results: Sequence[Result]) -> str:
    """The settings in which the results differ."""
    parts = ("model", "step", "configuration", "versions")
    flat = [
        config.flatten({**{k: r.content[k] for k in parts if k in r.content}, "tasks": _settings(r)}) for r in results
    ]
    keys = dict.fromkeys(key for leaves in flat for key in leaves)
    differing = [key for key in keys if len({repr(leaves.get(key)) for leaves in flat}) > 1]
    if not differing:
        return ""
    head = "".join(f"<th>{_dot(i)}{escape(result.name)}</th>" for i, result in enumerate(results))
    cells = {key: "".join(f"<td>{escape(str(own.get(key, '')))}</td>" for own in flat) for key in differing}
    rows = (f"<tr><th>{escape(key)}</th>{own}</tr>" for key, own in cells.items())
    table = f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
    return section("Differences in settings", table)


def _settings(result: Result) -> dict[str, Any]:
    return {name: task.get("configuration", {}) for name, task in result.content.get("tasks", {}).items()}


def _command(result: Result) -> str:
    command = shlex.join(result.content.get("command", [])) or "not recorded"
    notes = [
        f"{name}: {key}: {note}"
        for name, task in result.content.get("tasks", {}).items()
        for key, note in task.get("notes", {}).items()
    ]
    told = "".join(f"<br><small>{escape(note)}</small>" for note in notes)
    return f"<p><b>{escape(result.name)}</b> <code>{escape(command)}</code>{told}</p>"
