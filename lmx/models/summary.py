"""A model at a glance: its parameters and where they lie, what a token costs, and what decoding keeps."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lmx.kernels.masks import Mask
from lmx.models.flops import Path, Score, Weight, attending, blocks, scores, seen, weights
from lmx.models.model import cast_floats, param_axes, param_shapes
from lmx.models.specs import ModelSpec
from lmx.sharding.rules import Sharding


@dataclass(frozen=True)
class Parameter:
    """A parameter as it is kept.

    Attributes:
      weight: what it is, and what it costs a token.
      split: for each dimension the mesh axes that cut it; none where there is no mesh.
      bytes: of the whole, padding rows included.
      device_bytes: of one device's piece.
    """

    weight: Weight
    split: tuple[tuple[str, ...], ...]
    bytes: int
    device_bytes: int


@dataclass(frozen=True)
class Kept:
    """What decoding keeps in layers that attend alike.

    Attributes:
      layers: how many, over the whole stack.
      bytes: for each position, all these layers together.
      most: how many positions are ever looked at, of a row as long as the context; None for all of them.
      memory: whether positions are the source's, written once.
    """

    layers: int
    bytes: int
    most: int | None
    memory: bool

    def row(self, length: int) -> int:
        """Bytes that a row of ``length`` positions needs; a window no more than its width."""
        return self.bytes * min(length, self.most or length)


@dataclass(frozen=True)
class Summary:
    """The whole model; ``length`` is of the rows that FLOPs are a mean over."""

    context: int
    length: int
    mesh: dict[str, int]
    parameters: tuple[Parameter, ...]
    scores: tuple[Score, ...]
    kept: tuple[Kept, ...]

    @property
    def count(self) -> int:
        """Parameters, without the padding rows."""
        return sum(p.weight.parameters for p in self.parameters)

    @property
    def active(self) -> int:
        """Parameters that one token goes through."""
        return round(sum(p.weight.active for p in self.parameters))

    @property
    def bytes(self) -> int:
        """Of the parameters, padding rows included."""
        return sum(p.bytes for p in self.parameters)

    @property
    def device_bytes(self) -> int:
        """Of one device's parameters."""
        return sum(p.device_bytes for p in self.parameters)

    @property
    def weight_flops(self) -> float:
        """Of the forward pass for one token: products with weights."""
        return sum(p.weight.flops for p in self.parameters)

    @property
    def score_flops(self) -> float:
        """Of the forward pass for one token: attention's products with keys and values."""
        return sum(score.flops for score in self.scores)

    @property
    def train_flops(self) -> float:
        """For one token, as :func:`~lmx.models.flops.train_flops_per_token` defines them."""
        return 3 * (self.weight_flops + sum(score.most_flops for score in self.scores))

    def below(self, path: Path) -> "Summary":
        """The part whose parameters' paths start with ``path``; ``kept`` stays the whole model's."""
        start = len(path)
        parameters = tuple(p for p in self.parameters if p.weight.path[:start] == path)
        return replace(self, parameters=parameters, scores=tuple(s for s in self.scores if s.path[:start] == path))

    def cache_bytes(self, *, memory: bool = False) -> int:
        """Bytes that decoding keeps for one more position of the row, or of the source."""
        return sum(k.bytes for k in self.kept if k.memory == memory)

    def cache_row(self, *, memory: bool = False) -> int:
        """Bytes that decoding keeps of a row of ``length`` positions, or of a source as long."""
        return sum(k.row(self.length) for k in self.kept if k.memory == memory)


def summarize(
    spec: ModelSpec, length: int, *, sharding: Sharding | None = None, dtype: Any = "float32", cache: Any = "bfloat16"
) -> Summary:
    """Sums a model up from shapes alone: no parameter is made, and no device of the mesh is needed.

    Args:
      spec: the model.
      length: of the rows, in tokens.
      sharding: a mesh, which may be a ``jax.sharding.AbstractMesh``, and rules; None for one device.
      dtype: of the parameters.
      cache: dtype of what decoding keeps.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    shapes = jax.eval_shape(lambda: cast_floats(jax.tree.map(lambda a: jnp.zeros(a.shape), param_shapes(spec)), dtype))
    if sharding is not None:
        sharding.check_divides(param_axes(spec), shapes)
    pairs = zip(weights(spec, length), jax.tree.leaves(shapes), strict=True)
    return Summary(
        context=spec.context,
        length=length,
        mesh={} if sharding is None else dict(sharding.mesh.shape),
        parameters=tuple(_parameter(weight, leaf.dtype.itemsize, sharding) for weight, leaf in pairs),
        scores=tuple(scores(spec, length)),
        kept=kept(spec, cache),
    )


def _parameter(weight: Weight, itemsize: int, sharding: Sharding | None) -> Parameter:
    whole = math.prod(weight.shape) * itemsize
    if sharding is None:
        return Parameter(weight, ((),) * len(weight.shape), whole, whole)
    piece = sharding.named(weight.axes).shard_shape(weight.shape)
    rules, mesh = sharding.rules, sharding.mesh.shape
    laid = (getattr(rules, name) if name else () for name in weight.axes)
    split = tuple(tuple(axis for axis in axes if mesh[axis] > 1) for axes in laid)
    return Parameter(weight, split, whole, math.prod(piece) * itemsize)


def kept(spec: ModelSpec, dtype: Any) -> tuple[Kept, ...]:
    """What decoding keeps, layers that attend alike together; nothing where a position sees later ones.

    Where a window is narrower than the context, the layer needs no more positions than that.
    """
    found: dict[tuple[bool, int | None], list[int]] = {}
    for path, block, layers in blocks(spec):
        for _, part in attending(block) if path[0] == "stack" else ():
            assert part.scores is not None
            memory, mask = part.scores.memory, part.scores.mask
            if memory or not mask.looks_ahead:
                bytes_ = _position_elements(part, memory) * jnp.dtype(dtype).itemsize * len(layers)
                most = None if memory else _bound(mask, spec.context)
                total = found.setdefault((memory, most), [0, 0])
                total[0] += len(layers)
                total[1] += bytes_
    return tuple(Kept(layers, bytes_, most, memory) for (memory, most), (layers, bytes_) in found.items())


def _bound(mask: Mask, context: int) -> int | None:
    most = seen(mask, context).most
    return most if most < context else None


def _position_elements(part: Any, memory: bool) -> int:
    """How many numbers one more position adds to the streams of a sublayer."""
    nothing, one = part.cache_streams(1, 0, 0), part.cache_streams(1, int(not memory), int(memory))
    return sum(math.prod(one[name]) - math.prod(nothing[name]) for name in one)


def to_data(summary: Summary) -> dict[str, Any]:
    """The summary as plain data, for JSON: bytes, FLOPs of the forward pass for one token, and the tensors."""
    return {
        "parameters": summary.count,
        "active_parameters": summary.active,
        "bytes": summary.bytes,
        "device_bytes": summary.device_bytes,
        "mesh": summary.mesh,
        "devices": math.prod(summary.mesh.values()),
        "context": summary.context,
        "length": summary.length,
        "flops_per_token": {
            "forward": summary.weight_flops + summary.score_flops,
            "weights": summary.weight_flops,
            "scores": summary.score_flops,
            "train": summary.train_flops,
        },
        "cache_bytes": {
            "per_token": summary.cache_bytes(),
            "per_source_token": summary.cache_bytes(memory=True),
            "row": summary.cache_row(),
            "source_row": summary.cache_row(memory=True),
            "kinds": [
                {"layers": k.layers, "bytes": k.bytes, "most_positions": k.most, "of_source": k.memory}
                for k in summary.kept
            ],
        },
        "tensors": [_tensor(p) for p in summary.parameters],
        "scores": [
            {"path": "/".join(s.path), "layers": _layers(s.layers), "positions": s.positions, "flops": s.flops}
            for s in summary.scores
        ],
    }


def _tensor(parameter: Parameter) -> dict[str, Any]:
    weight = parameter.weight
    return {
        "path": "/".join(weight.path),
        "layers": _layers(weight.layers),
        "shape": list(weight.shape),
        "axes": list(weight.axes),
        "sharding": [list(axes) for axes in parameter.split],
        "parameters": weight.parameters,
        "active_parameters": round(weight.active),
        "bytes": parameter.bytes,
        "device_bytes": parameter.device_bytes,
        "flops": weight.flops,
    }


def _layers(layers: range | None) -> dict[str, int] | None:
    return None if layers is None else {"first": layers[0], "last": layers[-1], "step": layers.step}
