"""Hugging Face checkpoints: a family's configuration, and its parameters from and to their tensors."""

import fnmatch
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lmx.config import nearest
from lmx.errors import UserError
from lmx.models import families
from lmx.models.config import ModelConfig
from lmx.models.model import param_axes, param_shapes
from lmx.models.names import Stored
from lmx.models.specs import StackSpec
from lmx.nn.module import Params


@dataclass(frozen=True)
class Place:
    """One parameter of one layer: where it lies in the stacked, padded parameters, and how it is stored.

    Attributes:
      path: of the stacked parameter.
      index: its part of that array, without other layers and without the padding of the vocabulary.
      shape: of that part.
      stored: the family's map of it.
    """

    path: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    stored: Stored


Plan = dict[str, list[Place]]
"""The places that each tensor holds, side by side."""


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The configuration in the content of a Hugging Face ``config.json``.

    Raises:
      UserError: a model type that is no family here, a missing number, or an option that the family lacks.
    """
    known = {family.family: family for family in (getattr(families, name) for name in families.__all__)}
    kind = config.get("model_type")
    if kind not in known:
        raise UserError(f"config.json has the model_type {kind!r}, expected {nearest(str(kind), known)}")
    return cast(ModelConfig, known[kind].from_huggingface(config))


def import_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray], dtype: Any = np.float32) -> Params:
    """The parameters that a checkpoint's tensors hold.

    Args:
      config: the model's.
      tensors: all of the checkpoint, by name.
      dtype: of the parameters; None keeps each tensor's own.

    Returns:
      NumPy arrays in the shapes of ``lmx.models.model.param_shapes``: layers stacked, vocabulary padded with
      zeros.

    Raises:
      UserError: tensors that are missing, unexpected, or not of the configuration's shape, by name.
    """
    plan, shapes = _plan(config), _flat(param_shapes(config.spec()))
    _check(config, plan, tensors)
    params: dict[str, np.ndarray] = {}
    for name, places in plan.items():
        tensor, stored = np.asarray(tensors[name]), places[0].stored
        ends = np.cumsum([stored.joined(p.shape)[-1] for p in places])[:-1]
        for place, piece in zip(places, np.split(stored.turn(tensor), ends, axis=-1), strict=True):
            if place.path not in params:
                params[place.path] = np.zeros(shapes[place.path].shape, dtype or tensor.dtype)
            params[place.path][place.index] = piece.reshape(place.shape)
    return cast(Params, unflatten_dict(params, sep="/"))


def export_tensors(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """The tensors that hold these parameters, in their dtypes: the inverse of :func:`import_tensors`."""
    arrays = {path: np.asarray(array) for path, array in _flat(params).items()}
    tensors = {}
    for name, places in _plan(config).items():
        pieces = [arrays[p.path][p.index].reshape(p.stored.joined(p.shape)) for p in places]
        tensors[name] = np.ascontiguousarray(places[0].stored.turn(np.concatenate(pieces, axis=-1)))
    return tensors


def _flat(tree: Params) -> dict[str, Any]:
    return cast(dict[str, Any], flatten_dict(tree, sep="/"))


def _plan(config: ModelConfig) -> Plan:
    """Every tensor of the model; those that share one are in the order of the family's map."""
    spec, order = config.spec(), list(config.names.stored)
    shapes, axes = _flat(param_shapes(spec)), _flat(param_axes(spec))
    plan: Plan = defaultdict(list)
    for path in sorted(shapes, key=lambda path: order.index(_name(path))):
        stored = config.names.stored[_name(path)]
        named = zip(axes[path], shapes[path].shape, strict=True)
        sizes = [spec.vocab if axis == "vocab" else size for axis, size in named]
        inside = tuple(slice(n) for n in sizes)
        if not path.startswith("stack/"):
            plan[stored.name].append(Place(path, inside, tuple(sizes), stored))
            continue
        for repeat, layer in enumerate(_layers(spec.stack, path)):
            place = Place(path, (repeat, *inside[1:]), tuple(sizes[1:]), stored)
            plan[stored.name.format(layer=layer)].append(place)
    return plan


def _name(path: str) -> str:
    """A parameter's name in the family's map: stack/segment_0/block_1/mlp/... -> layer/mlp/..."""
    return "layer/" + path.split("/", 3)[3] if path.startswith("stack/") else path


def _layers(stack: StackSpec, path: str) -> range:
    """The layers' numbers along the leading axis of stack/segment_i/block_j/..."""
    segment, block = (int(part.rsplit("_", 1)[1]) for part in path.split("/")[1:3])
    lengths = [s.repeats * len(s.pattern) for s in stack.segments]
    first = sum(lengths[:segment])
    return range(first + block, first + lengths[segment], len(stack.segments[segment].pattern))


def _check(config: ModelConfig, plan: Plan, tensors: Mapping[str, np.ndarray]) -> None:
    ignored = config.names.ignored
    missing = [name for name in plan if name not in tensors]
    extra = [n for n in tensors if n not in plan and not any(fnmatch.fnmatchcase(n, p) for p in ignored)]
    if missing or extra:
        found = {"lacks": missing, "has the unexpected": extra}
        parts = [f"{verb} {_some(names)}" for verb, names in found.items() if names]
        raise UserError(f"the checkpoint {' and '.join(parts)}; is it a {config.family} of these sizes?")
    for name, places in plan.items():
        stored, shape = places[0].stored, tuple(tensors[name].shape)
        *inputs, _ = stored.joined(places[0].shape)
        expected = (*inputs, sum(stored.joined(p.shape)[-1] for p in places))
        expected = expected[::-1] if stored.transposed else expected
        if shape != expected:
            raise UserError(f"the tensor {name} has the shape {shape}, but the configuration says {expected}")


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
