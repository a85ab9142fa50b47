"""A rate that rises without end, and what its losses say: the learning-rate finder (Smith 2017, section 3.3)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lmx.errors import LmxError, UserError
from lmx.optim.schedule import Schedule

RULE = "a tenth of the rate at which the smoothed loss is lowest (Howard and Gugger 2020, chapter 5)"
"""How a rate is suggested."""


@dataclass(frozen=True)
class Rising(Schedule):
    """Rises exponentially, from ``first`` to ``last`` over the run; the other fields play no part."""

    first: float = 1e-6
    last: float = 1.0

    def at(self, step: jax.Array, steps: int) -> jax.Array:
        """The float32 learning rate of int32 ``step`` (from 0) in a run of ``steps``."""
        share = jnp.asarray(step, jnp.float32) / max(steps - 1, 1)
        return jnp.float32(self.first) * jnp.float32(self.last / self.first) ** share

    def check(self, steps: int) -> None:
        """Raises UserError if the numbers cannot make a sweep of ``steps`` steps."""
        if not 0 < self.first < self.last:
            raise UserError(f"the rates go from {self.first} to {self.last}, expected above 0 and rising")
        if steps < 10:
            raise UserError(f"a sweep of {steps} steps tells nothing; take at least 10")


@dataclass(frozen=True)
class Sweep:
    """The losses that followed a step at each of some rising rates.

    Attributes:
      rates: the rates.
      losses: nats a target after the step at each of them.
      smoothed: their average, each weighing ``smoothing`` times the one after it.
      diverged: whether the last rate ended the sweep before its time.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    diverged: bool

    @property
    def lowest(self) -> float:
        """The rate at which the smoothed loss is lowest."""
        return self.rates[int(np.nanargmin(self.smoothed))]

    @property
    def steepest(self) -> float:
        """The rate before :attr:`lowest` at which the smoothed loss falls fastest, by the rate's logarithm."""
        end = int(np.nanargmin(self.smoothed)) + 1
        slopes = np.gradient(self.smoothed[:end], np.log(self.rates[:end]))
        return self.rates[int(np.argmin(slopes))]

    @property
    def suggested(self) -> float:
        """By :data:`RULE`."""
        return self.lowest / 10

    def check(self) -> None:
        """Raises LmxError if it suggests nothing: the loss did not fall."""
        if int(np.nanargmin(self.smoothed)) < 2:
            raise LmxError(
                f"the loss did not fall at any rate from {self.rates[0]:.1e} to {self.rates[-1]:.1e}; take more steps, "
                "or rates that begin lower"
            )


class Smoother:
    """The running average of a sweep's losses, and whether they have diverged."""

    def __init__(self, smoothing: float, stop: float):
        if not 0 <= smoothing < 1 or not stop > 1:
            raise UserError(f"smoothing is {smoothing} and stop {stop}, expected 0 to below 1 and more than 1")
        self._smoothing, self._stop = smoothing, stop
        self._sum, self._weight, self._lowest = 0.0, 0.0, math.inf

    def push(self, loss: float) -> tuple[float, bool]:
        """The average with a new loss, and whether it is ``stop`` times the lowest so far, or not a number."""
        self._sum = self._smoothing * self._sum + loss
        self._weight = self._smoothing * self._weight + 1
        smoothed = self._sum / self._weight
        self._lowest = min(self._lowest, smoothed)
        return smoothed, not smoothed < self._stop * self._lowest
