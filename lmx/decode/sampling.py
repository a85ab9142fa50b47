"""Choosing the next token from logits.

Which filters are in use shapes the compiled program; their values are arguments of it, so that another temperature
compiles nothing.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lmx.errors import UserError
from lmx.kernels.attention import MASKED


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The filters apply in the order of the fields, as in the literature's usual order."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens (Fan et al. 2018); 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach p (Holtzman et al. 2020); 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024); 0 keeps all."""
    repetition_penalty: float = 1.0
    """Logits of tokens already seen are divided by it if positive, else multiplied (Keskar et al. 2019); 1: off."""

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p < 1, "from 0 (off) to below 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is off"),
        )
        for name, good, expected in checks:
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def filters(self) -> "Filters":
        """Which filters are in use."""
        drawn = self.temperature > 0
        return Filters(
            drawn=drawn,
            ranked=drawn and (self.top_k > 0 or self.top_p < 1),
            floored=drawn and self.min_p > 0,
            penalised=self.repetition_penalty != 1,
        )

    def values(self) -> dict[str, jax.Array]:
        """The filters' values as arrays."""
        return {
            "temperature": jnp.float32(self.temperature),
            "top_k": jnp.int32(self.top_k),
            "top_p": jnp.float32(self.top_p),
            "min_p": jnp.float32(self.min_p),
            "repetition_penalty": jnp.float32(self.repetition_penalty),
        }


@dataclass(frozen=True)
class Filters:
    """The parts of the sampling program: draw at all, rank (top-k, top-p), floor (min-p), penalise repetition."""

    drawn: bool
    ranked: bool
    floored: bool
    penalised: bool


def choose(
    filters: Filters,
    values: dict[str, jax.Array],
    logits: jax.Array,
    seen: jax.Array,
    keys: jax.Array,
    known: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, and its log-probability under the model's own distribution.

    Args:
      filters: which filters are in use.
      values: their values, scalars.
      logits: float32 [batch, vocab].
      seen: bool [batch, vocab], the tokens of prompt and completion; [batch, 0] unless penalised.
      keys: one PRNG key a row, [batch]: a row's draw depends on its own key and logits alone.
      known: only tokens below it are drawn; None for all.

    Returns:
      int32 [batch] and float32 [batch].
    """
    scores, seen = logits[:, :known], seen[:, :known]
    if filters.penalised:
        penalty = values["repetition_penalty"]
        scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    if filters.drawn:
        scores = scores / values["temperature"]
        floor = jnp.full(scores.shape[:1], MASKED)
        if filters.ranked:
            floor = _rank_floor(scores, values["top_k"], values["top_p"])
        if filters.floored:
            floor = jnp.maximum(floor, scores.max(-1) + jnp.log(values["min_p"]))
        scores = jnp.where(scores >= floor[:, None], scores, MASKED)
        draw = functools.partial(jax.random.gumbel, shape=scores.shape[1:])
        scores = scores + jax.vmap(draw)(keys)
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    at_token = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, at_token - jax.nn.logsumexp(logits, axis=-1)


def _rank_floor(scores: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The lowest score [batch] that top-k and then top-p keep."""
    ordered = -jnp.sort(-scores, axis=-1)
    rank = jnp.arange(scores.shape[-1])
    ordered = jnp.where((rank < top_k) | (top_k == 0), ordered, MASKED)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p) & (ordered > MASKED)
    return jnp.where(kept, ordered, jnp.inf).min(-1)
