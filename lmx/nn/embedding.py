"""Token embeddings, with learned positions where a model has them."""

import functools
from dataclasses import dataclass

import jax
from flax import nnx

from lmx.nn.context import Context
from lmx.nn.module import Part, dropout, parameter
from lmx.sharding.rules import constrain


@dataclass(frozen=True)
class Embedding:
    """Rows of a [vocab, embed] table; ``positions`` more rows are learned for positions, if not 0."""

    vocab: int
    """Rows, padding included."""
    positions: int = 0
    dropout: float = 0.0
    std: float = 0.02

    def part(self, width: int) -> Part:
        """The module: int32 tokens [batch, length] -> [batch, length, width]."""
        return Part(functools.partial(EmbeddingModule, self, width))


class EmbeddingModule(nnx.Module):
    """int32 [batch, length] -> [batch, length, embed]."""

    def __init__(self, spec: Embedding, width: int, rngs: nnx.Rngs):
        self.spec = spec
        init = nnx.initializers.normal(spec.std)
        self.table = parameter(rngs, (spec.vocab, width), ("vocab", "embed"), init)
        shape = (spec.positions, width)
        self.position = parameter(rngs, shape, ("position", "embed"), init) if spec.positions else None

    def __call__(self, tokens: jax.Array, context: Context) -> jax.Array:
        x = constrain(self.table[...], ("vocab", None))[tokens]
        if self.position is not None:
            x = x + constrain(self.position[...], ("position", None))[context.positions]
        return dropout(x, self.spec.dropout, context.key)


@dataclass(frozen=True)
class Head:
    """An output table [vocab, embed] of its own, for models that do not tie it to the embedding."""

    vocab: int
    std: float = 0.02

    def part(self, width: int) -> Part:
        """The module that holds the table."""
        return Part(functools.partial(HeadModule, self, width))


class HeadModule(nnx.Module):
    """Holds ``table`` [vocab, embed]."""

    def __init__(self, spec: Head, width: int, rngs: nnx.Rngs):
        self.table = parameter(rngs, (spec.vocab, width), ("vocab", "embed"), nnx.initializers.normal(spec.std))
