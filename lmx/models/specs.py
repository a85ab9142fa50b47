"""The shape of a model, as data: sublayers make blocks, blocks make a stack, stacks and their ends make a model."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from lmx.kernels.masks import Mask
from lmx.nn.embedding import Embedding
from lmx.nn.head import Head, TaskHead
from lmx.nn.noise import StochasticDepth, TokenNoise
from lmx.nn.norm import Norm
from lmx.nn.relative import Shared
from lmx.nn.sublayer import Sublayer

Remat = Literal["none", "dots", "full"]
"""What the forward pass keeps for the backward: everything, the results of matrix products, or block inputs only."""
LONGEST_PERIOD = 16


@dataclass(frozen=True)
class BlockSpec:
    """Sublayers, applied one after the other; ``depth`` skips some of them in training."""

    sublayers: tuple[Sublayer, ...]
    depth: StochasticDepth | None = None

    @property
    def parts(self) -> tuple[Sublayer, ...]:
        """The sublayers, and in the place of one that runs others, those."""
        return tuple(part for sublayer in self.sublayers for part in sublayer.parts.values())

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
    """Segments, one after the other: real models are not one period.

    Attributes:
      segments: at least one.
      shared: what belongs to the whole stack, as T5's table of relative positions.
    """

    segments: tuple[Segment, ...]
    shared: tuple[Shared, ...] = ()

    @classmethod
    def of(cls, blocks: Iterable[BlockSpec], shared: tuple[Shared, ...] = ()) -> "StackSpec":
        """The stack of these layers, with the repeats among them found: as few different segments as can be.

        From the front, the pattern that covers the most layers is taken, the shortest of those that do.
        """
        rest, segments = list(blocks), []
        while rest:
            periods = range(1, min(LONGEST_PERIOD, len(rest)) + 1)
            repeats = {p: _repeats(rest, p) for p in periods}
            best = max(periods, key=lambda p: (p * repeats[p] if repeats[p] > 1 else 1, -p))
            segments.append(Segment(tuple(rest[:best]), repeats[best]))
            rest = rest[best * repeats[best] :]
        return cls(tuple(segments), shared)

    @property
    def longest(self) -> int:
        """The number of the segment with the most layers, the first of equals: the one that stages may split."""
        layers = [segment.repeats * len(segment.pattern) for segment in self.segments]
        return layers.index(max(layers))

    def blocks(self) -> tuple[BlockSpec, ...]:
        """Every block, in the order of the layers."""
        return tuple(block for s in self.segments for _ in range(s.repeats) for block in s.pattern)

    def masks(self) -> frozenset[Mask]:
        """Those of its self-attention."""
        parts = (part for s in self.segments for block in s.pattern for part in block.parts)
        return frozenset(part.scores.mask for part in parts if part.scores and not part.scores.memory)

    @property
    def looks_ahead(self) -> bool:
        """Whether some position sees what comes after it, as an encoder's do."""
        return any(mask.looks_ahead for mask in self.masks())


def _repeats(blocks: list[BlockSpec], period: int) -> int:
    """How often the first ``period`` blocks come, one after the other."""
    count = 1
    while blocks[count * period : (count + 1) * period] == blocks[:period]:
        count += 1
    return count


@dataclass(frozen=True)
class EncoderSpec:
    """The encoder of an encoder-decoder; its embedding may take the decoder's table (``vocab`` 0).

    ``decoder_start`` is the token that the decoder starts with.
    """

    embedding: Embedding
    stack: StackSpec
    final_norm: Norm | None
    decoder_start: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only or encoder-only model, or the decoder of an encoder-decoder with its encoder.

    Attributes:
      vocab: tokens of the vocabulary; the tables' rows are padded beyond it, and their logits are masked.
      width: of the residual stream.
      context: the longest sequence.
      head: predicts tokens; None in a model that only has other heads.
      encoder: None in a model of one stack.
      tasks: heads beside the prediction of tokens.
    """

    vocab: int
    width: int
    context: int
    embedding: Embedding
    stack: StackSpec
    final_norm: Norm | None
    head: Head | None
    encoder: EncoderSpec | None = None
    tasks: tuple[TaskHead, ...] = ()


def noisy(spec: ModelSpec, *, depth: float = 0.0, drop: float = 0.0, swap: float = 0.0) -> ModelSpec:
    """The spec with what is drawn at random in training: see :mod:`lmx.nn.noise`.

    Args:
      spec: the model's.
      depth: the rate at which the last layer of each stack is skipped.
      drop: share of the input's tokens whose embedding is 0.
      swap: share of them that are another token.
    """

    def one(part: Any) -> Any:
        skip = StochasticDepth(depth, len(part.stack.blocks())) if depth else None
        segments = (replace(s, pattern=tuple(replace(b, depth=skip) for b in s.pattern)) for s in part.stack.segments)
        noise = TokenNoise(drop, swap, spec.vocab) if drop or swap else None
        stack = replace(part.stack, segments=tuple(segments))
        return replace(part, stack=stack, embedding=replace(part.embedding, noise=noise))

    return replace(one(spec), encoder=None if spec.encoder is None else one(spec.encoder))


def padded(vocab: int, multiple: int = 128) -> int:
    """The vocabulary rounded up so that every usual mesh divides it (GPT-2's 50257 is not divisible by 8)."""
    return -(-vocab // multiple) * multiple
