"""One self-contained HTML page about one run, or several side by side."""

import math
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lmx import config
from lmx.errors import UserError
from lmx.files import write_file
from lmx.report import curves, times
from lmx.report.html import document, section
from lmx.report.runs import Run, Sample, read_run

_SAMPLES = 8


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page and returns its path.

    Args:
      run_dirs: the directories of the runs, in the order to show them; the first takes the first colour.
      out: where the page goes. By default ``report.html`` in the run's directory, or, of several, in the
        directory that holds them all.

    Raises:
      UserError: a directory holds no run, a file in it is damaged, or matplotlib is not installed.
    """
    if not run_dirs:
        raise UserError("a report needs at least one run directory")
    runs = _named_apart([read_run(Path(d)) for d in run_dirs], run_dirs)
    page = out or Path(os.path.commonpath([Path(d).resolve() for d in run_dirs])) / "report.html"
    write_file(page, _page(runs))
    return page


def _named_apart(runs: list[Run], run_dirs: Sequence[Path]) -> list[Run]:
    """Runs by the last part of their path, or by all of it where two share that."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [Run(**{**vars(r), "name": str(d)}) for r, d in zip(runs, run_dirs, strict=True)]


def _page(runs: Sequence[Run]) -> str:
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    sections = (
        _overview(runs),
        _differences(runs),
        _curves(runs),
        times.goodput(runs, section),
        times.hosts(runs, section),
        _samples(runs),
        _configuration(runs),
        _data(runs),
        _fingerprint(runs),
    )
    return document(title, "".join(sections))


def _overview(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return _compare("Overview", runs, [_facts(run) for run in runs])
    facts = {**_facts(runs[0]), **{_words(k): v for k, v in runs[0].summary.items() if not _nested(v)}}
    tiles = (f"<div><dt>{escape(k)}</dt><dd>{_value(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="tiles">{"".join(tiles)}</dl>\n'


def _facts(run: Run) -> dict[str, Any]:
    """The few numbers that say how a run went, from its curves."""
    series = run.series
    facts: dict[str, Any] = {"steps": max(int(s.steps[-1]) for s in series.values())}
    if "loss" in series:
        facts["last loss"] = float(curves.smooth(series["loss"].values)[0][-1])
    for key in ("eval_loss", "eval_bits_per_byte"):
        if key in series and np.isfinite(series[key].values).any():
            facts[f"best {_words(key)}"] = float(np.nanmin(series[key].values))
    if "tokens_per_second" in series:
        facts["tokens per second"] = float(np.nanmedian(series["tokens_per_second"].values))
    if run.goodput:
        facts["goodput"] = f"{run.goodput.share:.1%}"
    return facts


def _curves(runs: Sequence[Run]) -> str:
    figures = "".join(f"<figure>{curves.draw(p, runs)}</figure>" for p in curves.panels(runs))
    note = "Faint: each logged step. Bold: the mean over 2% of them. Dots: held-out text. Rare peaks are cut."
    same = [f"{escape(_words(key))} {_value(value)}" for key, value in curves.constants(runs).items()]
    note += f" Always the same: {', '.join(same)}." if same else ""
    return section("Curves", f'{_legend(runs)}<p class="note">{note}</p><div class="grid">{figures}</div>')


def _legend(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    keys = (f"<li>{_dot(i)}{escape(run.name)}</li>" for i, run in enumerate(runs))
    return f'<ul class="legend">{"".join(keys)}</ul>'


def _dot(index: int) -> str:
    return f'<span class="dot" style="background:{curves.color(index)}"></span>'


def _samples(runs: Sequence[Run]) -> str:
    blocks = [_run_samples(run, i if len(runs) > 1 else None) for i, run in enumerate(runs) if run.samples]
    return section("Samples through training", "".join(blocks)) if blocks else ""


def _run_samples(run: Run, index: int | None) -> str:
    by_prompt: dict[str, list[Sample]] = {}
    for sample in run.samples:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    name = "" if index is None else f"<h3>{_dot(index)}{escape(run.name)}</h3>"
    return name + "".join(_prompt_samples(prompt, found) for prompt, found in by_prompt.items())


def _prompt_samples(prompt: str, samples: list[Sample]) -> str:
    shown = _spread(samples, _SAMPLES)
    rows = "".join(
        f'<div class="sample"><span class="step">step {s.step:,}</span>'
        f"<pre><i>{escape(prompt)}</i>{escape(s.text.removeprefix(prompt))}</pre></div>"
        for s in reversed(shown)
    )
    left = f" ({len(shown)} of {len(samples)} shown)" if len(shown) < len(samples) else ""
    heading = f"<code>{escape(prompt)}</code>" if prompt.strip() else "no prompt"
    return f'<details open><summary>{heading}{left}</summary><div class="grid">{rows}</div></details>'


def _spread(items: list[Sample], count: int) -> list[Sample]:
    """At most ``count`` of the items, evenly spread, with the first and the last."""
    picked = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in picked]


def _configuration(runs: Sequence[Run]) -> str:
    trees = [(run.name, run.configuration) for run in runs if run.configuration]
    return _details("Configuration", trees, open_one=len(runs) == 1)


def _differences(runs: Sequence[Run]) -> str:
    if sum(bool(run.configuration) for run in runs) < 2:
        return ""
    flat = [config.flatten(run.configuration) for run in runs]
    keys = dict.fromkeys(key for leaves in flat for key in leaves)
    differing = [k for k in keys if len({repr(leaves.get(k)) for leaves in flat}) > 1]
    if not differing:
        return section("Differences in configuration", "<p>None: the configurations are the same.</p>")
    rows = [{k: leaves.get(k, "not there") for k in differing} for leaves in flat]
    return _compare("Differences in configuration", runs, rows)


def _data(runs: Sequence[Run]) -> str:
    return _details("Data", [(run.name, run.data) for run in runs if run.data], open_one=len(runs) == 1)


def _fingerprint(runs: Sequence[Run]) -> str:
    return _details("Fingerprint", [(run.name, run.fingerprint) for run in runs if run.fingerprint])


def _details(title: str, trees: list[tuple[str, dict[str, Any]]], *, open_one: bool = False) -> str:
    """A section of one tree for each run, folded up unless ``open_one``."""
    if not trees:
        return ""
    if open_one:
        return section(title, _tree(trees[0][1]))
    folded = (f"<details><summary>{escape(n)}</summary>{_tree(t)}</details>" for n, t in trees)
    return section(title, "".join(folded))


def _compare(title: str, runs: Sequence[Run], columns: Sequence[dict[str, Any]]) -> str:
    """A table with a column for each run."""
    keys = dict.fromkeys(key for column in columns for key in column)
    head = "".join(f"<th>{_dot(i)}{escape(run.name)}</th>" for i, run in enumerate(runs))
    rows = (_row(k, [_value(c[k]) if k in c else "" for c in columns]) for k in keys)
    return section(title, f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>')


def _tree(data: dict[str, Any]) -> str:
    """Nested data: its plain values as a table, what is nested below as parts that fold."""
    plain = {k: v for k, v in data.items() if not _nested(v) and k != config.TYPE_KEY}
    table = f"<table>{''.join(_row(k, [_value(v)]) for k, v in plain.items())}</table>" if plain else ""
    return table + "".join(_branch(k, v) for k, v in data.items() if _nested(v))


def _nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))


def _branch(key: str, value: Any) -> str:
    inner = value if isinstance(value, dict) else {str(i): v for i, v in enumerate(value)}
    kind = f" <small>{escape(str(inner[config.TYPE_KEY]))}</small>" if config.TYPE_KEY in inner else ""
    return f"<details open><summary>{escape(key)}{kind}</summary>{_tree(inner)}</details>"


def _row(key: str, cells: Iterable[str]) -> str:
    return f"<tr><th>{escape(key)}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"


def _words(key: str) -> str:
    return key.replace("eval_", "held-out ").replace("_", " ")


def _value(value: Any) -> str:
    """A value as escaped text, numbers short enough to read."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "empty"
    return escape(str(value))
