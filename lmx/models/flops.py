"""Model FLOPs and parameter counts: what the computation needs, not what an implementation spends.

A token is one position of a row. In an encoder-decoder it is one position of the source and one of the target: both
rows have the same length, so that every weight is used once a token, unless it is said how long the decoder's are.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lmx.kernels.masks import Mask
from lmx.models.model import param_axes, param_shapes
from lmx.models.specs import BlockSpec, ModelSpec, StackSpec
from lmx.nn.head import SequenceHead
from lmx.nn.sublayer import Sublayer
from lmx.sharding.rules import LogicalAxes

Path = tuple[str, ...]


@dataclass(frozen=True)
class Weight:
    """One parameter, stacked over the layers that have it.

    Attributes:
      path: its keys in the parameters.
      layers: which layers of its stack it stands for; None outside of the blocks.
      shape: as it is kept, with the padding rows of the tables; ``axes`` names each dimension.
      parameters: how many, without the padding rows.
      active: how many of these one token goes through: not the experts that were not chosen.
      flops: of the forward pass for one token: 2 for each weight of a matrix product that it goes through; a looked-up
        row, a norm and a bias count nothing.
    """

    path: Path
    layers: range | None
    shape: tuple[int, ...]
    axes: LogicalAxes
    parameters: int
    active: float
    flops: float


@dataclass(frozen=True)
class Score:
    """Attention beside its weights, in all the layers of one place in a stack.

    Attributes:
      path: the sublayer's keys in the parameters.
      layers: as a Weight's.
      positions: what a token sees on average over a row that is one document.
      flops: of the forward pass for one token that sees as many.
      most_flops: the same where every token sees as many as the last of a long row.
      memory: whether it sees the other stack's positions.
    """

    path: Path
    layers: range
    positions: float
    flops: float
    most_flops: float
    memory: bool = False


@dataclass(frozen=True)
class Seen:
    """How many positions of a row a query sees: on average over the row's queries, and at most."""

    mean: float
    most: int


@functools.lru_cache(maxsize=64)
def seen(mask: Mask, length: int) -> Seen:
    """Counts what a mask shows, in a row of ``length`` positions that is one document without padding.

    What a query sees is one run of positions around its own, so that its two ends can be searched for.
    """
    query: Any = np.arange(length, dtype=np.int32)
    back = _furthest(lambda d: mask.allowed(query, query - d), query)
    ahead = _furthest(lambda d: mask.allowed(query, query + d), length - 1 - query)
    count = back + ahead + 1
    return Seen(float(count.mean()), int(count.max()))


def _furthest(allowed: Callable[[Any], Any], limit: np.ndarray) -> np.ndarray:
    """For each query the largest distance up to ``limit`` that is allowed; all smaller ones are."""
    low, high = np.zeros_like(limit), limit
    while (low < high).any():
        middle = (low + high + 1) // 2
        good = np.asarray(allowed(middle))
        low, high = np.where(good, middle, low), np.where(good, high, middle - 1)
    return low


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the model; the padding rows of the tables are not counted."""
    return sum(weight.parameters for weight in weights(spec, 1))


def active_parameter_count(spec: ModelSpec) -> int:
    """Parameters that one token goes through, tables included: of a mixture the k chosen and the shared experts."""
    return round(sum(weight.active for weight in weights(spec, 1)))


def train_flops_per_token(
    spec: ModelSpec, length: int, decoder: int | None = None, predicted: int | None = None
) -> float:
    """FLOPs to train on one token of a row of ``length`` (Chowdhery et al. 2022, appendix B).

    6 for each weight that multiplies it (of a mixture: of the chosen experts), the output table included and lookups
    not, and for each layer's attention 6 * heads * (key width + value width) * length, which is 12 * heads * head_dim
    * length where the two are equal. The causal half is not taken off; a window has its own width in place of length.

    Args:
      spec: the model.
      length: positions of a row; of the source's where there are two stacks.
      decoder: positions of the decoder's row there; None for as many as the source's.
      predicted: positions of a row that meet the output table; None for all of its last stack's.
    """
    own = decoder or length
    rows = _Rows(length, own if spec.encoder is not None else length, predicted or own)
    products = sum(weight.flops * rows.positions(weight.path) for weight in weights(spec, length))
    pairs = zip(scores(spec, length), scores(spec, own), strict=True)
    attended = sum(
        (a if a.memory or a.path[0] == "encoder" else b).most_flops * rows.positions(a.path) for a, b in pairs
    )
    return 3 * (products + attended) / length


@dataclass(frozen=True)
class _Rows:
    """Positions of a row: of the source, of the decoder, and of those that meet the output table."""

    source: int
    decoder: int
    predicted: int

    def positions(self, path: Path) -> int:
        """How many go through a parameter, or attend where that is a sublayer's path."""
        of_memory = "cross_attention" in path and path[-2:-1] in (("key",), ("value",))
        if path[0] in ("encoder", "tasks") or of_memory:
            return self.source
        return self.predicted if path[0] in ("embedding", "head") else self.decoder


def forward_flops_per_token(spec: ModelSpec, length: int) -> float:
    """FLOPs of the forward pass for one token: the mean over a row of ``length``, the causal half taken off."""
    return _weight_flops(spec, length) + sum(score.flops for score in scores(spec, length))


def _weight_flops(spec: ModelSpec, length: int) -> float:
    return sum(weight.flops for weight in weights(spec, length))


def blocks(spec: ModelSpec) -> Iterator[tuple[Path, BlockSpec, range]]:
    """Every block that has parameters of its own: their path, its spec, and the layers that it stands for."""
    stacks: dict[Path, StackSpec] = {("stack",): spec.stack}
    if spec.encoder is not None:
        stacks[("encoder", "stack")] = spec.encoder.stack
    for path, stack in stacks.items():
        first = 0
        for i, segment in enumerate(stack.segments):
            period = len(segment.pattern)
            end = first + segment.repeats * period
            for j, block in enumerate(segment.pattern):
                yield (*path, f"segment_{i}", f"block_{j}"), block, range(first + j, end, period)
            first = end


def weights(spec: ModelSpec, length: int) -> list[Weight]:
    """Every parameter, in the tree's order; a head that answers once for a row of ``length`` is shared by its tokens.

    Nothing is made: shapes alone are traced.
    """
    places = {path: (block, layers) for path, block, layers in blocks(spec)}
    leaves = jax.tree.leaves_with_path(param_shapes(spec))
    axes = jax.tree.leaves(param_axes(spec), is_leaf=lambda x: isinstance(x, tuple))

    def one(path: Path, shape: tuple[int, ...], names: LogicalAxes) -> Weight:
        place = next((path[:n] for n in (3, 4) if path[:n] in places), None)
        block, layers = places[place] if place else (None, None)
        share = _share(block, path[len(place) :]) if block and place else 1.0
        real = zip(names, shape, strict=True)
        count = math.prod(min(size, spec.vocab) if name == "vocab" else size for name, size in real)
        return Weight(path, layers, shape, names, count, share * count, 2 * share * count * _uses(spec, path, length))

    return [one(tuple(k.key for k in p), a.shape, names) for (p, a), names in zip(leaves, axes, strict=True)]


def _share(block: BlockSpec, path: Path) -> float:
    """The share of one of a block's parameters that a token goes through; norms belong to no sublayer."""
    sublayers = dict(zip(block.names(), block.sublayers, strict=True))
    return sublayers[path[0]].used("/".join(path[1:])) if path[0] in sublayers else 1.0


def _uses(spec: ModelSpec, path: Path, length: int) -> float:
    """How often a token is multiplied by a parameter: once, not at all, or once a row."""
    table = ("embedding" if spec.head and spec.head.tied else "head", "table")
    if path[-1] != "kernel" and path != table:
        return 0.0
    once_a_row = {task.name for task in spec.tasks if isinstance(task, SequenceHead)}
    return 1 / length if path[0] == "tasks" and path[1] in once_a_row else 1.0


def attending(block: BlockSpec) -> Iterator[tuple[Path, Sublayer]]:
    """The parts of a block that attend, with their keys in its parameters."""
    for name, sublayer in zip(block.names(), block.sublayers, strict=True):
        for key, part in sublayer.parts.items():
            if part.scores is not None:
                yield (name, key) if key else (name,), part


def scores(spec: ModelSpec, length: int) -> list[Score]:
    """Every attention in the model; a source, too, has ``length`` positions."""

    def one(path: Path, part: Sublayer, layers: range) -> Score:
        assert part.scores is not None
        count, each = seen(part.scores.mask, length), 2.0 * part.scores.dims * len(layers)
        return Score(path, layers, count.mean, each * count.mean, each * count.most, part.scores.memory)

    places = [(place, layers, found) for place, block, layers in blocks(spec) for found in attending(block)]
    return [one(place + key, part, layers) for place, layers, (key, part) in places]
