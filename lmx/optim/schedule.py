"""Learning-rate schedules: linear warmup, then a named shape."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from lmx.config import NOT_NEGATIVE, SHARE
from lmx.errors import UserError

Shape = Literal["constant", "cosine", "linear", "rsqrt", "wsd"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate by step: it rises linearly to ``peak`` over ``warmup`` steps and then follows ``shape``."""

    shape: Shape = "cosine"
    """constant; cosine or linear down to the end; rsqrt: peak * sqrt(warmup / step); wsd: warmup-stable-decay."""
    peak: Annotated[float, NOT_NEGATIVE] = 3e-4
    """The highest learning rate."""
    warmup: int = 100
    """Steps of linear warmup."""
    final: Annotated[float, SHARE] = 0.1
    """The last learning rate, as a share of the peak (cosine, linear, wsd)."""
    decay: Annotated[float, SHARE] = 0.2
    """Share of the steps in which wsd goes down, linearly, at the end (Hu et al. 2024)."""

    def at(self, step: jax.Array, steps: int) -> jax.Array:
        """The float32 learning rate of int32 ``step`` (from 0) in a run of ``steps``."""
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.peak * rise * SHAPES[self.shape](self, step, float(steps))

    def check(self, steps: int) -> None:
        """Raises UserError if the numbers cannot make a schedule of ``steps`` steps."""
        if not 0 <= self.warmup < max(steps, 1):
            raise UserError(
                f"schedule.warmup is {self.warmup} steps, expected at least 0 and less than train.steps {steps}"
            )


def _constant(s: Schedule, step: jax.Array, steps: float) -> jax.Array:
    return jnp.ones_like(step)


def _progress(s: Schedule, step: jax.Array, steps: float) -> jax.Array:
    return jnp.clip((step - s.warmup) / max(steps - s.warmup, 1), 0, 1)


def _cosine(s: Schedule, step: jax.Array, steps: float) -> jax.Array:
    return s.final + (1 - s.final) * 0.5 * (1 + jnp.cos(jnp.pi * _progress(s, step, steps)))


def _linear(s: Schedule, step: jax.Array, steps: float) -> jax.Array:
    return 1 - (1 - s.final) * _progress(s, step, steps)


def _rsqrt(s: Schedule, step: jax.Array, steps: float) -> jax.Array:
    base = float(max(s.warmup, 1))
    return jnp.sqrt(base / jnp.maximum(step + 1, base))


def _wsd(s: Schedule, step: jax.Array, steps: float) -> jax.Array:
    length = max(steps * s.decay, 1)
    return 1 - (1 - s.final) * jnp.clip((step - (steps - length)) / length, 0, 1)


SHAPES: dict[str, Callable[[Schedule, jax.Array, float], jax.Array]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "rsqrt": _rsqrt,
    "wsd": _wsd,
}
