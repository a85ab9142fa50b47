"""The shape of a model, as data: sublayers make blocks, blocks make a stack, a stack and its ends make a model."""

from dataclasses import dataclass
from typing import Literal

from lmx.nn.embedding import Embedding, Head
from lmx.nn.norm import Norm
from lmx.nn.sublayer import Sublayer

Remat = Literal["none", "dots", "full"]
"""What the forward pass keeps for the backward: everything, the results of matrix products, or block inputs only."""


@dataclass(frozen=True)
class BlockSpec:
    """Sublayers, applied one after the other."""

    sublayers: tuple[Sublayer, ...]

    def names(self) -> tuple[str, ...]:
        """The sublayers' keys in the parameters: their names, numbered where one comes again."""
        seen = [s.name for s in self.sublayers]
        return tuple(n if seen[:i].count(n) == 0 else f"{n}_{seen[:i].count(n)}" for i, n in enumerate(seen))


@dataclass(frozen=True)
class Segment:
    """A pattern of blocks, repeated; training scans over the repeats."""

    pattern: tuple[BlockSpec, ...]
    repeats: int


@dataclass(frozen=True)
class StackSpec:
    """Segments, one after the other: real models are not one period."""

    segments: tuple[Segment, ...]

    def blocks(self) -> tuple[BlockSpec, ...]:
        """Every block, in the order of the layers."""
        return tuple(block for s in self.segments for _ in range(s.repeats) for block in s.pattern)


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only or encoder-only model: embedding, one stack, a final norm, and an output table.

    Attributes:
      vocab: tokens of the vocabulary; the tables' rows are padded beyond it, and their logits are masked.
      width: of the residual stream.
      context: the longest sequence.
      head: None ties the output table to the embedding.
    """

    vocab: int
    width: int
    context: int
    embedding: Embedding
    stack: StackSpec
    final_norm: Norm
    head: Head | None


def padded(vocab: int, multiple: int = 128) -> int:
    """The vocabulary rounded up so that every usual mesh divides it (GPT-2's 50257 is not divisible by 8)."""
    return -(-vocab // multiple) * multiple
