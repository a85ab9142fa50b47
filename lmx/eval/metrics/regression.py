"""Measures of numbers: the mean absolute error, Pearson's and Spearman's correlation."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lmx.eval.metrics.measure import Measure, bootstrapped, mean


def regression_measures(expected: np.ndarray, predicted: np.ndarray) -> dict[str, Measure]:
    """What is usually told of predicted numbers.

    Args:
      expected: float [n, numbers], the right ones.
      predicted: float [n, numbers].

    Returns:
      ``mean_absolute_error``, ``pearson`` and ``spearman``, each a mean over the numbers of an example.

    Raises:
      UserError: no examples.
    """
    error = mean(np.abs(predicted - expected).mean(-1), "mean_absolute_error")

    def correlation(of: Callable[[np.ndarray, np.ndarray], float], name: str) -> Measure:
        columns = [(expected[:, i], predicted[:, i]) for i in range(expected.shape[1])]
        return bootstrapped(lambda i: float(np.mean([of(a[i], b[i]) for a, b in columns])), len(expected), name)

    return {
        "mean_absolute_error": replace(error, higher_is_better=False),
        "pearson": correlation(pearson, "pearson"),
        "spearman": correlation(spearman, "spearman"),
    }


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """The linear correlation of float [n] with float [n]; 0 where either is always the same."""
    a, b = a - a.mean(), b - b.mean()
    spread = float((a @ a) * (b @ b))
    return float(a @ b) / spread**0.5 if spread > 0 else 0.0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of the ranks; equal values share the mean of theirs."""
    return pearson(ranks(a), ranks(b))


def ranks(values: np.ndarray) -> np.ndarray:
    """The place of each of float [n] in their order, from 1, as float [n]."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
