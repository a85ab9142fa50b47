"""The curves of a run as SVG: text stays text, and its colours follow the page from light to dark."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lmx.errors import UserError
from lmx.report.runs import Run, Series

# Hues that keep apart on white and on near-black, also for the colour-blind (after Okabe and Ito, 2008).
COLORS = ("#2f7fd6", "#e07b1a", "#17a07c", "#c65fa5", "#8f7ae6", "#b59a00", "#d9534f", "#5f9ea8")
# Stand for the page's own colours, which matplotlib cannot name.
_VARIABLES = {"#010203": "var(--ink)", "#040506": "var(--grid)", "#070809": "var(--card)"}
_INK, _GRID, _CARD = _VARIABLES
Scale = Literal["linear", "log", "steep"]
_SIZE = (5.4, 3.1)
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.9, 0.12, 0.5, 0.36
"""Inches beside the axes: room for any number. To measure the labels takes matplotlib as long as to draw them."""
LETTER = 0.085
"""Inches that a letter of a label takes, at most on average."""
_POINTS = 1200


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    ``key`` names the number that is drawn, ``marked`` one that is added as dots, and ``smooth`` adds a moving
    average. A ``steep`` scale cuts off what is higher than almost all the rest: the loss of the first steps.
    """

    title: str
    unit: str
    key: str
    marked: str | None = None
    smooth: bool = True
    scale: Scale = "linear"


PANELS = (
    Panel("Loss", "nats per token", "loss", marked="eval_loss", scale="steep"),
    Panel("Held-out bits per byte", "bits per byte", "eval_bits_per_byte", smooth=False),
    Panel("Held-out perplexity", "per token", "eval_perplexity", smooth=False, scale="log"),
    Panel("Gradient norm", "global L2 norm", "grad_norm", scale="steep"),
    Panel("Learning rate", "per step", "learning_rate", smooth=False),
    Panel("Throughput", "tokens per second", "tokens_per_second"),
    Panel("Step time", "seconds", "step_seconds"),
)
KNOWN = {name for panel in PANELS for name in (panel.key, panel.marked) if name}
"""The numbers that these panels show."""


def color(index: int) -> str:
    """The colour of the run at ``index`` in every panel."""
    return COLORS[index % len(COLORS)]


def panels(runs: Sequence[Run]) -> tuple[Panel, ...]:
    """The panels that these runs have numbers for: the known ones, then one for any other number that changes."""
    logged = {key for run in runs for key in run.series}
    others = (Panel(k.replace("_", " ").capitalize(), "", k) for k in sorted(logged - KNOWN - constants(runs).keys()))
    return tuple(p for p in (*PANELS, *others) if {p.key, p.marked} & logged)


def constants(runs: Sequence[Run]) -> dict[str, float]:
    """The other numbers that are the same throughout these runs: no curve tells more of them."""
    found: dict[str, set[float]] = {}
    for run in runs:
        for key in sorted(run.series.keys() - KNOWN):
            found.setdefault(key, set()).update(run.series[key].values.tolist())
    return {key: values.pop() for key, values in found.items() if len(values) == 1}


def draw(panel: Panel, runs: Sequence[Run]) -> str:
    """One panel with a line for each run, as an ``<svg>`` element.

    Raises:
      UserError: matplotlib is not installed.
    """

    def paint(axes: Any, matplotlib: Any) -> None:
        for index, run in enumerate(runs):
            _draw_run(axes, panel, run, color(index))
        _label(axes, panel, matplotlib)
        last = max(series.steps[-1] for run in runs for series in run.series.values())
        axes.set_xlim(-0.02 * last, 1.02 * last)

    return painted(panel.title, paint)


def painted(
    title: str, paint: Callable[[Any, Any], None], size: tuple[float, float] = _SIZE, left: float = _LEFT
) -> str:
    """What ``paint(axes, matplotlib)`` draws, as an ``<svg>`` element; ``size``, and the room to the ``left`` of the
    axes, are in inches.

    Raises:
      UserError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_style()):
        figure = matplotlib.figure.Figure(figsize=size)
        paint(figure.add_axes(_inside(size, left)), matplotlib)
        return _svg(figure, title)


def _inside(size: tuple[float, float], left: float) -> tuple[float, float, float, float]:
    """Where the axes lie in a figure of ``size`` inches: left, bottom, width and height, as shares of it."""
    width, height = size
    return left / width, _BOTTOM / height, 1 - (left + _RIGHT) / width, 1 - (_BOTTOM + _TOP) / height


def smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """The centred moving average of [points] values, and the number of points (2% of them) it goes over.

    Values that are not finite are left out; at the ends the window is as wide as it can be.
    """
    width = max(1, len(values) // 50) | 1
    good = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(good, values, 0.0), kernel, "same")
    count = np.convolve(good.astype(float), kernel, "same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0), width


def thin(series: Series) -> Series:
    """A series of at most 1,200 points that looks the same: the extremes of each stretch stay."""
    stretch = -(-2 * len(series.steps) // _POINTS)
    if stretch <= 2:
        return series
    starts = range(0, len(series.steps), stretch)
    kept = sorted({i for s in starts for i in _extremes(series.values[s : s + stretch], s)})
    return Series(series.steps[kept], series.values[kept])


def _extremes(values: np.ndarray, start: int) -> tuple[int, ...]:
    if not np.isfinite(values).any():
        return (start,)
    return start + int(np.nanargmin(values)), start + int(np.nanargmax(values))


def _draw_run(axes: Any, panel: Panel, run: Run, hue: str) -> None:
    series = run.series.get(panel.key)
    if series is not None and panel.smooth and len(series.steps) >= 100:
        mean = thin(Series(series.steps, smooth(series.values)[0]))
        raw = thin(series)
        axes.plot(raw.steps, raw.values, color=hue, alpha=0.28, linewidth=0.7)
        axes.plot(mean.steps, mean.values, color=hue, linewidth=1.8)
    elif series is not None:
        few = len(series.steps) <= 60
        line = thin(series)
        axes.plot(line.steps, line.values, color=hue, linewidth=1.6, marker="o" if few else "", markersize=3)
    held_out = run.series.get(panel.marked) if panel.marked else None
    if held_out is not None:
        style = {"linestyle": (0, (4, 2)), "linewidth": 1.1, "marker": "o", "markersize": 4.5}
        axes.plot(held_out.steps, held_out.values, color=hue, markeredgecolor=_CARD, **style)


def _label(axes: Any, panel: Panel, matplotlib: Any) -> None:
    ticker = matplotlib.ticker
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_tick))
    _scale(axes, panel.scale, ticker)
    low, high = axes.get_ylim()
    if panel.scale == "log" or high >= 1000 or max(abs(low), abs(high)) < 0.01:
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(_tick))


def _scale(axes: Any, scale: Scale, ticker: Any) -> None:
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    values = values[np.isfinite(values)]
    if scale == "steep" and len(values) >= 100:
        low, high = np.quantile(values, (0.0, 0.98))
        axes.set_ylim(low - 0.06 * (high - low), min(high + 0.1 * (high - low), axes.get_ylim()[1]))
    elif scale == "log" and len(values) and values.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _tick(value: float, _position: int) -> str:
    if value != 0 and abs(value) < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _svg(figure: Any, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub("<metadata>.*</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _style() -> dict[str, Any]:
    """Applied to matplotlib's defaults; ``fonttype none`` keeps text as text, in the page's own font."""
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK)
    lines = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _GRID)
    return {
        **ink,
        **lines,
        "svg.fonttype": "none",
        "svg.hashsalt": "lmx",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "grid.linewidth": 0.6,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
    }


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ModuleNotFoundError as error:
        raise UserError(
            f"a report needs {error.name}, which is not installed; run: pip install 'lmx[report]'"
        ) from error
    return matplotlib
