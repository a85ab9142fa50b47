"""Parameters from a checkpoint's tensors: one stacked parameter at a time, and of it what this process holds."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from lmx.checkpoint.huggingface.arrays import copy, finite
from lmx.checkpoint.huggingface.plan import Holder, make_plan, match
from lmx.checkpoint.huggingface.tensors import InMemory, Tensors
from lmx.models.config import ModelConfig
from lmx.nn.module import Params
from lmx.sharding.rules import LogicalAxes, Sharding

Box = tuple[slice, ...]
"""A range for each axis of an array, with a start and a stop."""
Held = Sequence[tuple[Holder, int, str]]
"""The tensors that hold a parameter, which of those in them it is, and their names in the checkpoint."""


def import_params(
    config: ModelConfig, tensors: Tensors, *, dtype: Any = None, sharding: Sharding | None = None
) -> Params:
    """The parameters that a checkpoint holds.

    No more of the host's memory is in use at a time than for this process's part of one stacked parameter and for one
    tensor, beside the parameters that are done where the host is the device.

    Args:
      config: the model's.
      tensors: the checkpoint's.
      dtype: of the parameters; None keeps each tensor's own.
      sharding: where the parameters lie; one device holds them by default. A process reads only the layers, experts and
        rows that its devices hold.

    Returns:
      Arrays in the shapes of ``lmx.models.model.param_shapes``: layers stacked, vocabulary padded with zeros.

    Raises:
      UserError: tensors that are missing, unexpected, or not of the configuration's shape, by name; or a mesh that does
        not divide the parameters.

    Warns:
      UserWarning: a tensor with NaN or infinite values, by name.
    """
    plan = make_plan(config)
    found = match(plan, tensors)
    if sharding is not None:
        sharding.check_divides(plan.axes, plan.shapes)
    by_path = plan.by_path()

    def load(keys: Any, shape: jax.ShapeDtypeStruct, axes: LogicalAxes) -> jax.Array:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        holders = [(holder, which, found[holder.name]) for holder, which in by_path[path]]
        layout = SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding.named(axes)
        kind = _common_dtype(holders, tensors) if dtype is None else np.dtype(dtype)
        return _load(shape.shape, kind, layout, holders, tensors)

    return cast(Params, jax.tree.map_with_path(load, plan.shapes, plan.axes))


def import_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray], dtype: Any = np.float32) -> Params:
    """:func:`import_params` of arrays in memory."""
    return import_params(config, InMemory(tensors), dtype=dtype)


def _load(
    shape: tuple[int, ...], dtype: np.dtype, layout: jax.sharding.Sharding, holders: Held, tensors: Tensors
) -> jax.Array:
    """One parameter, on its devices."""
    box = _bounds(shape, layout)
    host = gather(box, dtype, holders, tensors)
    array = jax.make_array_from_callback(shape, layout, lambda index: host[_within(cast(Box, index), box)])
    return jax.block_until_ready(array)  # else the next parameter's memory is taken before this one's is free


def gather(box: Box, dtype: np.dtype, holders: Held, tensors: Tensors) -> np.ndarray:
    """A box of a stacked, padded parameter, from the tensors that hold any of it."""
    host = np.zeros([axis.stop - axis.start for axis in box], dtype)
    for holder, which, name in holders:
        _fill(host, box, holder, which, tensors, name)
    return host


def _common_dtype(holders: Held, tensors: Tensors) -> np.dtype:
    """The dtype that holds what all of these tensors hold."""
    return functools.reduce(jnp.promote_types, (tensors.info(name).dtype for *_, name in holders))


def _bounds(shape: tuple[int, ...], layout: jax.sharding.Sharding) -> Box:
    """The smallest box around what this process's devices hold."""
    indices = layout.addressable_devices_indices_map(shape).values()
    ranges = [[axis.indices(n) for axis, n in zip(index, shape, strict=True)] for index in indices if index is not None]
    return tuple(slice(min(r[0] for r in axis), max(r[1] for r in axis)) for axis in zip(*ranges, strict=True))


def _within(index: Sequence[slice], box: Box) -> Box:
    """An index into the whole array as one into the box."""
    return tuple(
        slice((axis.start or 0) - outer.start, (outer.stop if axis.stop is None else axis.stop) - outer.start)
        for axis, outer in zip(index, box, strict=True)
    )


def _fill(host: np.ndarray, box: Box, holder: Holder, which: int, tensors: Tensors, name: str) -> None:
    """Puts what a tensor holds of the box into its place."""
    place = holder.places[which]
    depth = len(place.at)
    if not all(outer.start <= at < outer.stop for at, outer in zip(place.at, box, strict=False)):
        return
    wanted = [slice(outer.start, min(outer.stop, n)) for outer, n in zip(box[depth:], place.shape, strict=True)]
    if any(axis.start >= axis.stop for axis in wanted):  # padding of the vocabulary only
        return

    def read(rows: slice) -> np.ndarray:
        array = tensors.read(name, rows)
        if not finite(array):
            warnings.warn(f"the tensor {name} holds NaN or infinite values", stacklevel=2)
        return array

    at = tuple(i - outer.start for i, outer in zip(place.at, box, strict=False))
    target = host[(*at, *(slice(axis.stop - axis.start) for axis in wanted))]
    copy(target, holder.stored.read(read, holder.shapes, which, wanted))
