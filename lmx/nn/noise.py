"""What is drawn at random in training beside dropout: layers that are skipped, tokens that are not seen."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

DEPTH = 1 << 16
"""The number by which a sublayer's context is folded for its depth; its parts fold by small ones."""


@dataclass(frozen=True)
class StochasticDepth:
    """Skips what a sublayer adds to whole rows (Huang et al. 2016): layer l of n with the probability rate * l / n.

    What is kept is divided by its probability, so that nothing changes outside of training.

    Attributes:
      rate: of the last layer.
      layers: in the stack.
    """

    rate: float
    layers: int

    def __call__(self, x: jax.Array, layer: Any, key: jax.Array | None) -> jax.Array:
        """[batch, length, embed] of the layer number ``layer`` (from 0), each row kept or 0; no key, no change."""
        if key is None:
            return x
        keep = 1 - self.rate * (layer + 1) / self.layers
        kept = jax.random.bernoulli(key, keep, (x.shape[0], 1, 1))
        return jnp.where(kept, x / keep, 0).astype(x.dtype)


@dataclass(frozen=True)
class TokenNoise:
    """Hides tokens of the input: their embedding is 0 (Gal and Ghahramani 2016, by position), or another token's.

    Attributes:
      drop: share of the tokens whose embedding is 0.
      swap: share that are another token of the vocabulary, drawn evenly.
      vocab: tokens to draw from.
    """

    drop: float
    swap: float
    vocab: int

    def tokens(self, tokens: jax.Array, key: jax.Array | None) -> jax.Array:
        """int32 [batch, length], some of them swapped; no key, no change."""
        if key is None or not self.swap:
            return tokens
        which, what = jax.random.split(jax.random.fold_in(key, 1))
        others = jax.random.randint(what, tokens.shape, 0, self.vocab, tokens.dtype)
        return jnp.where(jax.random.bernoulli(which, self.swap, tokens.shape), others, tokens)

    def embeddings(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """[batch, length, embed], some tokens' all 0; no key, no change."""
        if key is None or not self.drop:
            return x
        kept = jax.random.bernoulli(jax.random.fold_in(key, 2), 1 - self.drop, x.shape[:2])
        return jnp.where(kept[..., None], x, 0)
