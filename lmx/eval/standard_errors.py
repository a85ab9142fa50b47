"""The standard errors of a score: how it would vary with other rows of the same kind."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from lmx.eval.metrics.measure import BOOTSTRAP, SCORES, Measure, bootstrapped
from lmx.eval.score import Score, score


def row_measures(found: Score, sums: Mapping[str, np.ndarray], together: int) -> dict[str, Measure]:
    """The numbers of a score, by a bootstrap over rows: ratios of sums, of which rows give numerator and denominator.

    Args:
      found: the score.
      sums: of each group of rows, float64 [groups, ...], as of :func:`lmx.eval.score.jit_row_sums`; groups without
        targets are left out.
      together: rows in a group.
    """
    kept = {name: array[sums["weight"] > 0] for name, array in sums.items()}
    unit = "rows" if together == 1 else f"groups of {together} rows"
    method = BOOTSTRAP.replace("examples", unit)
    measures = {}
    for name, better in SCORES.items():
        if getattr(found, name) is not None:
            measure = bootstrapped(_number(name, kept), len(kept["weight"]), name, better)
            measures[name] = replace(measure, method=method)
    return measures


def _number(name: str, sums: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], float]:
    def of(index: np.ndarray) -> float:
        value = getattr(score([{key: array[index].sum(0) for key, array in sums.items()}]), name)
        return math.nan if value is None else value  # a resample may hold no question about a pair

    return of
