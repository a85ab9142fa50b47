"""A number that was measured, and how sure it is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lmx.errors import UserError

RESAMPLES = 500
FORMULA = "s / sqrt(n)"
BOOTSTRAP = f"bootstrap, {RESAMPLES} resamples of the examples, seed 0"
SCORES = {
    "loss": False,
    "perplexity": False,
    "bits_per_byte": False,
    "accuracy": True,
    "pair_accuracy": True,
    "f1": True,
}
"""What is measured of held-out rows, and whether higher is better."""
HELD_OUT = "held-out text"
"""What stands for the name of a task where they are scored."""


@dataclass(frozen=True)
class Measure:
    """A value with its standard error (None where there is one example) and the way that this was found.

    ``higher_is_better`` is None where neither is (a stereotype score is best at 50).
    """

    value: float
    stderr: float | None
    method: str
    n: int
    higher_is_better: bool | None = True


def mean(values: Sequence[float] | np.ndarray, name: str) -> Measure:
    """The mean of one number for each example; its standard error is s / sqrt(n), s with n - 1 degrees of freedom.

    Raises:
      UserError: there are no values.
    """
    array = np.asarray(values, np.float64)
    check_some(len(array), name)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return Measure(float(array.mean()), error, FORMULA, len(array))


def bootstrapped(function: Callable[[np.ndarray], float], n: int, name: str, better: bool | None = True) -> Measure:
    """A number of all examples together, with the standard deviation of it over resamples of them (Efron 1979).

    Args:
      function: the number for examples with these numbers, int [n]; some may come several times.
      n: how many examples there are.
      name: of the metric, for the error.
      better: whether a higher one is better.

    Raises:
      UserError: there are none.
    """
    check_some(n, name)
    value = float(function(np.arange(n)))
    if n == 1:
        return Measure(value, None, BOOTSTRAP, n, better)
    rng = np.random.default_rng(0)
    resampled = [function(rng.integers(n, size=n)) for _ in range(RESAMPLES)]
    return Measure(value, float(np.std(resampled, ddof=1)), BOOTSTRAP, n, better)


def check_some(n: int, name: str) -> None:
    """Raises UserError if there is nothing to measure."""
    if n == 0:
        raise UserError(f"{name} has nothing to measure: no example is left; check the files, the limit and too_long")


def needs(package: str, what: str) -> UserError:
    """The error of a library that is not installed."""
    return UserError(f"{what} needs {package}, which is not installed; run: pip install 'lmx[eval]'")
