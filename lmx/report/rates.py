"""The page of a learning-rate sweep: one plot, and what it suggests."""

import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lmx.files import write_file
from lmx.optim.rising import RULE, Sweep
from lmx.report.curves import COLORS, painted
from lmx.report.style import CSS


def write_sweep(sweep: Sweep, name: str, page: Path) -> Path:
    """Writes a self-contained HTML page and returns its path.

    Raises:
      UserError: matplotlib is not installed.
    """
    facts = {"suggested": sweep.suggested, "steepest fall": sweep.steepest, "lowest loss": sweep.lowest}
    tiles = "".join(f"<div><dt>{escape(k)}</dt><dd>{v:.2g}</dd></div>" for k, v in facts.items())
    write_file(
        page,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}: learning rate</title>'
        f'<meta name="viewport" content="width=device-width"><style>{CSS}</style><main><h1>{escape(name)}: learning '
        f'rate</h1><dl class="tiles">{tiles}</dl><p class="note">Suggested: {escape(RULE)}.</p>'
        f"<figure>{draw_sweep(sweep)}</figure></main></html>\n",
    )
    return page


def draw_sweep(sweep: Sweep) -> str:
    """Losses over rates, as an ``<svg>`` element.

    Raises:
      UserError: matplotlib is not installed.
    """

    def paint(axes: Any, _: Any) -> None:
        axes.plot(sweep.rates, sweep.losses, color=COLORS[0], alpha=0.3, linewidth=0.8)
        axes.plot(sweep.rates, sweep.smoothed, color=COLORS[0], linewidth=1.8)
        for rate, label, color in ((sweep.suggested, "suggested", COLORS[2]), (sweep.lowest, "lowest", COLORS[1])):
            axes.axvline(rate, color=color, linewidth=1.2, linestyle=(0, (4, 2)))
            place = {"xytext": (-3, -4), "textcoords": "offset points", "rotation": 90, "ha": "right", "va": "top"}
            axes.annotate(label, (rate, 1), xycoords=("data", "axes fraction"), color=color, **place)
        axes.set(xscale="log", xlabel="learning rate", ylabel="nats per token")
        good = np.array([loss for loss in sweep.smoothed if math.isfinite(loss)])
        axes.set_ylim(good.min() - 0.1 * np.ptp(good), good.max() + 0.1 * np.ptp(good))

    return painted("Loss by learning rate", paint)
