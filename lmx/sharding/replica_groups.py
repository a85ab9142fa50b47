"""The groups of devices of a collective, in the forms that the text of optimized HLO has for them."""

import math
import re

import numpy as np

from lmx.errors import LmxError

PAIRS = re.compile(r"source_target_pairs=(\{\{.*?\}\}|\{\})")
LISTED = re.compile(r"replica_groups=(\{\{.*?\}\}|\{\})")
IOTA = re.compile(r"replica_groups=(\[[\d,]*\])<=(\[[\d,]*\](?:T\([\d,]*\))?)")
MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}")


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of devices, by their place in the mesh, that exchange something among themselves.

    Of a permutation these are the pairs of a source and its target, without those of a device with itself.

    Args:
      attributes: what follows the operands in an instruction's line.
      devices: how many the program runs on.

    Raises:
      LmxError: they are of an unknown form.
    """
    if found := PAIRS.search(attributes):
        return [[source, target] for source, target in _listed(found[1]) if source != target]
    if found := LISTED.search(attributes):
        return _listed(found[1]) or [list(range(devices))]
    if found := IOTA.search(attributes):
        return [list(map(int, group)) for group in _iota(found[2]).reshape(_numbers(found[1]))]
    if found := MESH.search(attributes):
        return _of_mesh(found[1], found[2], found[3])
    raise LmxError(f"a collective has groups of devices of an unknown form: {attributes[:200]}")


def _numbers(text: str) -> list[int]:
    return [int(i) for i in re.findall(r"\d+", text)]


def _listed(text: str) -> list[list[int]]:
    """``{{0,1},{2,3}}``."""
    return [group for part in text.split("}") if (group := _numbers(part))]


def _iota(text: str) -> np.ndarray:
    """``[4,2]T(1,0)``: the numbers from zero in this shape, transposed, and flat again."""
    shape, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (ids.transpose(_numbers(order)) if order else ids).ravel()


def _of_mesh(mesh: str, device_ids: str | None, along: str) -> list[list[int]]:
    """Groups along axes of a mesh, written ``'a'=2,'b'=8``, or along a part of one: ``'b':(2)4`` is the 4 places in
    each half of ``b``, which is split into the 2 before it first."""
    parts = re.findall(r"(\w+)'?(?::\((\d+)\)(\d+))?", along)
    shape, inside = list[int](), list[int]()
    for name, size in re.findall(r"(\w+)'?=(\d+)", mesh):
        done = 1
        for before, part in sorted((int(b or 1), int(p or size)) for axis, b, p in parts if axis == name):
            shape += [before // done, part]
            inside.append(len(shape) - 1)
            done = before * part
        shape.append(int(size) // done)
    ids = np.arange(math.prod(shape)) if device_ids is None else _iota(device_ids)
    if device_ids is not None and not device_ids.startswith("["):
        ids = np.array(_numbers(device_ids))
    order = [axis for axis in range(len(shape)) if axis not in inside] + inside
    groups = ids.reshape(shape).transpose(order).reshape(-1, math.prod(shape[axis] for axis in inside))
    return [list(map(int, group)) for group in groups]
