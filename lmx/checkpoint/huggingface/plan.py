"""Which tensor of a checkpoint holds which part of the parameters."""

import fnmatch
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from flax.traverse_util import flatten_dict

from lmx.checkpoint.huggingface.tensors import Tensors, some
from lmx.errors import UserError
from lmx.models.config import ModelConfig
from lmx.models.model import param_axes, param_shapes
from lmx.models.names import NameMap, Stored
from lmx.nn.module import Params


@dataclass(frozen=True)
class Place:
    """What a tensor holds of one parameter: that of one layer, or of one expert of one layer.

    Attributes:
      path: of the stacked, padded parameter.
      at: its place on the leading axes of that, the layer's and the expert's.
      shape: of the other axes, without the padding of the vocabulary.
    """

    path: str
    at: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def index(self) -> tuple[int | slice, ...]:
        """The same as an index into the parameter."""
        return (*self.at, *(slice(n) for n in self.shape))


@dataclass(frozen=True)
class Holder:
    """One tensor: its names, that to write first; how it lies; and the parameters in it, side by side."""

    names: list[str]
    stored: Stored
    places: list[Place]

    @property
    def name(self) -> str:
        """The name that it is written under."""
        return self.names[0]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the parameters in it."""
        return [place.shape for place in self.places]

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.stored.shape(self.shapes)


@dataclass(frozen=True)
class Plan:
    """All tensors of a model and all of its parameters.

    Attributes:
      family: the model's, for messages.
      names: its map.
      holders: by the tensors' names.
      shapes: of the stacked, padded parameters: a tree of ``jax.ShapeDtypeStruct``.
      axes: the parallel tree of their logical axes.
    """

    family: str
    names: NameMap
    holders: dict[str, Holder]
    shapes: Params
    axes: Params

    def by_path(self) -> dict[str, list[tuple[Holder, int]]]:
        """For each parameter the tensors that hold it, and which of the parameters in them it is."""
        found: dict[str, list[tuple[Holder, int]]] = {path: [] for path in flat(self.shapes)}
        for holder in self.holders.values():
            for i, place in enumerate(holder.places):
                found[place.path].append((holder, i))
        return found


@functools.lru_cache(maxsize=4)
def make_plan(config: ModelConfig) -> Plan:
    """The plan of a model. Raises UserError if its family has no Hugging Face form."""
    names_of = config.names.for_task(config.task)
    if not names_of.stored:
        raise UserError(f"the family {config.family} has no Hugging Face form to read or write")
    spec, order = config.spec(), {name: i for i, name in enumerate(names_of.stored)}
    shape_tree, axes_tree = param_shapes(spec), param_axes(spec)
    shapes, axes = {path: a.shape for path, a in flat(shape_tree).items()}, flat(axes_tree)
    holders: dict[str, Holder] = {}
    for path in sorted(shapes, key=lambda path: order[_name(path)]):
        stored = names_of.stored[_name(path)]
        sizes = [spec.vocab if axis == "vocab" else n for axis, n in zip(axes[path], shapes[path], strict=True)]
        for at, numbers in _parts(stored, path, shapes):
            names = [name.format(**numbers) for name in (stored.name, *stored.also)]
            holder = holders.setdefault(names[0], Holder(names, stored, []))
            holder.places.append(Place(path, at, tuple(sizes[len(at) :])))
    return Plan(config.family, names_of, holders, shape_tree, axes_tree)


def match(plan: Plan, tensors: Tensors) -> dict[str, str]:
    """For each tensor of the plan its name in a checkpoint.

    Raises:
      UserError: tensors that are missing, unexpected, or not of the configuration's shape, by name.
    """
    accepted = {alias: name for name, holder in plan.holders.items() for alias in holder.names}
    found: dict[str, str] = {}
    extra = []
    for own in sorted(tensors, key=lambda name: name not in plan.holders):  # a tensor's own name goes before others
        readings = plan.names.readings(own)
        name = next((accepted[reading] for reading in readings if reading in accepted), None)
        if name is not None:
            found.setdefault(name, own)
        elif not any(fnmatch.fnmatchcase(reading, p) for reading in readings for p in plan.names.ignored):
            extra.append(own)
    missing = [name for name in plan.holders if name not in found]
    if missing or extra:
        lists = {"lacks": missing, "has the unexpected": extra}
        parts = [f"{verb} {some(names)}" for verb, names in lists.items() if names]
        raise UserError(f"the checkpoint {' and '.join(parts)}; is it a {plan.family} of these sizes?")
    _check_shapes(plan, tensors, found)
    return found


def flat(tree: Params) -> dict[str, Any]:
    """A tree's leaves by path."""
    return cast(dict[str, Any], flatten_dict(tree, sep="/"))


def _check_shapes(plan: Plan, tensors: Tensors, found: Mapping[str, str]) -> None:
    wrong = []
    for name, holder in plan.holders.items():
        shape = tuple(tensors.info(found[name]).shape)
        if shape != holder.shape:
            wrong.append((found[name], shape, holder.shape))
    if wrong:
        name, shape, expected = wrong[0]
        more = f"; so do {some([name for name, *_ in wrong[1:]])}" if wrong[1:] else ""
        raise UserError(f"the tensor {name} has the shape {shape}, but the configuration says {expected}{more}")


def _in_stack(path: str) -> tuple[str, str, str, str] | None:
    """encoder/stack/segment_0/block_1/mlp/... -> encoder/, segment_0, block_1, mlp/...; None elsewhere."""
    before, stack, inside = path.rpartition("stack/")
    if not stack or not inside.startswith("segment_"):
        return None
    segment, block, name = inside.split("/", 2)
    return before, segment, block, name


def _name(path: str) -> str:
    """A parameter's name in the family's map."""
    where = _in_stack(path)
    return path if where is None else f"{where[0]}layer/{where[3]}"


def _parts(
    stored: Stored, path: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[tuple[int, ...], dict[str, int]]]:
    """The places on a parameter's leading axes that have tensors of their own, and the numbers in their names."""
    layers = _layers(path, shapes) if _in_stack(path) else None
    stacked = 0 if layers is None else 1
    experts = shapes[path][stacked] if "{expert}" in stored.name else None
    for repeat, layer in enumerate(layers or [0]):
        numbers = {} if layers is None else {"layer": layer}
        at = () if layers is None else (repeat,)
        if experts is None:
            yield at, numbers
        else:
            yield from (((*at, expert), {**numbers, "expert": expert}) for expert in range(experts))


def _layers(path: str, shapes: Mapping[str, tuple[int, ...]]) -> range:
    """The layers' numbers along the leading axis of stack/segment_i/block_j/..."""
    before, segment, block, _ = cast(tuple[str, str, str, str], _in_stack(path))
    first, patterns = 0, _segments(before, shapes)
    for i in range(_number(segment)):
        first += patterns[i][0] * patterns[i][1]
    period, repeats = patterns[_number(segment)]
    return range(first + _number(block), first + period * repeats, period)


def _segments(before: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, tuple[int, int]]:
    """For each segment of a stack how many blocks its pattern has, and how often it comes."""
    blocks: dict[int, set[int]] = defaultdict(set)
    repeats: dict[int, int] = {}
    for path, shape in shapes.items():
        where = _in_stack(path)
        if where is not None and where[0] == before:
            blocks[_number(where[1])].add(_number(where[2]))
            repeats[_number(where[1])] = shape[0]
    return {i: (len(blocks[i]), repeats[i]) for i in blocks}


def _number(part: str) -> int:
    return int(part.rpartition("_")[2])
