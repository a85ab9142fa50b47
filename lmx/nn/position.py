"""Positions that attention applies to queries and keys."""

import abc
import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmx.errors import UserError

Reach = int | jax.Array
"""How many positions a row may come to: one number, or int32 [batch]."""


@dataclass(frozen=True)
class RopeScaling(abc.ABC):
    """Base class: how rotary positions are stretched beyond the context that a model was first trained on."""

    @abc.abstractmethod
    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """The frequencies in place of float64 ``frequencies`` [dims / 2] (radians a position) with base ``theta``."""

    def chosen(self, frequencies: np.ndarray, theta: float, reach: Reach) -> jax.Array:
        """Float32 frequencies [1 or batch, dims / 2] of rows that come to ``reach`` positions."""
        return jnp.asarray(self.scaled(frequencies, theta)[None], jnp.float32)

    @property
    def amplitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        return 1.0


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Position interpolation (Chen et al. 2023): every position counts as 1 / ``factor``."""

    factor: float
    """The context over the original one."""

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """All divided by the factor."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1's (Dubey et al. 2024): wavelengths that are long for the original context are stretched, short ones
    are not, and between the two it goes in proportion to the turns in the original context."""

    factor: float
    """What long wavelengths are stretched by."""
    low_freq_factor: float
    """Dims that turn less often than this in the original context are stretched in full."""
    high_freq_factor: float
    """Dims that turn more often than this in the original context keep their frequency."""
    original_context: int
    """The context before it was stretched, in tokens."""

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Between frequencies / factor and the frequencies as they are."""
        turns = self.original_context * frequencies / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023): stretched by ``factor``, except for dims that turn often in the original context.

    DeepSeek-V3 also multiplies its scores: by ``softmax_factor``.
    """

    factor: float
    """The context over the original one."""
    original_context: int
    """The context before it was stretched, in tokens."""
    beta_fast: float = 32.0
    """Dims that turn this often in the original context, or more often, keep their frequency."""
    beta_slow: float = 1.0
    """Dims that turn this often, or less often, are stretched in full."""
    attention_factor: float | None = None
    """The amplitude; None: from the factor, mscale and mscale_all_dim."""
    mscale: float | None = None
    """Weight of log(factor) in the amplitude, where mscale_all_dim is given too."""
    mscale_all_dim: float | None = None
    """Weight of log(factor) in what the amplitude is divided by, and in the softmax factor."""
    truncate: bool = True
    """Whether the ramp between the two betas starts and ends at whole dims."""

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """A ramp over the dims from the frequencies as they are to frequencies / factor."""
        half = len(frequencies)
        low, high = (self._dim(turns, half, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        stretched = np.clip((np.arange(half) - low) / (high - low or 0.001), 0, 1)
        return stretched * frequencies / self.factor + (1 - stretched) * frequencies

    def _dim(self, turns: float, half: int, theta: float) -> float:
        """The pair of dims, as a fraction, that turns so often in the original context."""
        return half * math.log(self.original_context / (turns * 2 * math.pi)) / math.log(theta)

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def amplitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def softmax_factor(self) -> float:
        """What DeepSeek-V3's attention multiplies its scores by, beside 1 / sqrt(head_dim)."""
        return self._magnitude(self.mscale_all_dim or 0.0) ** 2


@dataclass(frozen=True)
class LongRope(RopeScaling):
    """LongRoPE (Ding et al. 2024), as Phi-3 has it: a factor for each pair of dims, one set for short rows and one
    for those that reach beyond the original context."""

    short: tuple[float, ...]
    """Each pair's factor in rows within the original context: dims / 2 numbers."""
    long: tuple[float, ...]
    """Each pair's factor in rows that reach beyond it."""
    original_context: int
    """The context before it was stretched, in tokens."""
    factor: float
    """The context over the original one; the amplitude follows from it."""
    attention_factor: float | None = None
    """The amplitude; None: from the factor."""

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """The frequencies of short rows."""
        return frequencies / self._factors(self.short, len(frequencies))

    def chosen(self, frequencies: np.ndarray, theta: float, reach: Reach) -> jax.Array:
        """By row: the short factors, or the long ones."""
        long = frequencies / self._factors(self.long, len(frequencies))
        short = self.scaled(frequencies, theta)
        beyond = jnp.atleast_1d(jnp.asarray(reach)) > self.original_context
        return jnp.where(beyond[:, None], jnp.asarray(long, jnp.float32), jnp.asarray(short, jnp.float32))

    @property
    def amplitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context)) if self.factor > 1 else 1.0

    def _factors(self, factors: tuple[float, ...], half: int) -> np.ndarray:
        if len(factors) != half:
            raise UserError(f"LongRope has {len(factors)} factors, but {2 * half} dims rotate: give {half} factors")
        return np.asarray(factors, np.float64)


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021): each pair of dims turns by its own angle a position.

    Raises UserError for an odd number of dims.
    """

    theta: float = 10_000.0
    """Base of the wavelengths."""
    dims: int | None = None
    """How many leading dims of a head rotate; the others stay as they are. None: all."""
    pairing: Literal["halves", "interleaved"] = "halves"
    """Which dims turn together: i and i + dims / 2 as in GPT-NeoX and Llama, or 2 i and 2 i + 1 as in the paper."""
    scaling: RopeScaling | None = None
    """How positions are stretched beyond the original context."""

    def __post_init__(self) -> None:
        if self.dims is not None and (self.dims < 2 or self.dims % 2):
            raise UserError(f"rotary dims is {self.dims}, expected an even number from 2 on: pairs of dims rotate")

    def rotate(self, x: jax.Array, positions: jax.Array, reach: Reach | None = None) -> jax.Array:
        """Rotates by position, in float32.

        Args:
          x: queries or keys [batch, length, heads, head_dim].
          positions: int32 [batch, length].
          reach: how many positions a row may come to, an int or int32 [batch]; only LongRope asks. None: as many as
            the row's positions here. Decoding must give it: cached keys are not rotated again.

        Returns:
          The shape and dtype of ``x``.

        Raises:
          UserError: the head's width is odd or less than ``dims``.
        """
        angles = self._angles(x.shape[-1], positions, positions.max(axis=1) + 1 if reach is None else reach)
        amplitude = self.scaling.amplitude if self.scaling else 1.0
        cos, sin = (amplitude * f(angles)[:, :, None] for f in (jnp.cos, jnp.sin))
        turned = x[..., : 2 * angles.shape[-1]].astype(jnp.float32)
        axis, shape = (-1, (-1, 2)) if self.pairing == "interleaved" else (-2, (2, -1))
        first, second = jnp.unstack(turned.reshape(*x.shape[:-1], *shape), axis=axis)
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis)
        rotated = pairs.reshape(turned.shape).astype(x.dtype)
        return jnp.concatenate([rotated, x[..., turned.shape[-1] :]], axis=-1)

    def _angles(self, head_dim: int, positions: jax.Array, reach: Reach) -> jax.Array:
        """Float32 radians [batch, length, dims / 2]."""
        dims = head_dim if self.dims is None else self.dims
        if dims > head_dim or dims % 2:
            raise UserError(f"{dims} dims cannot rotate in a head of {head_dim}: give an even number up to that")
        frequencies = self.theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
        chosen = (self.scaling or LinearScaling(1.0)).chosen(frequencies, self.theta, reach)
        return positions[..., None].astype(jnp.float32) * chosen[:, None]
