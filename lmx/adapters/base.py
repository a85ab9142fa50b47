"""The model beside an adapter: it is not saved with it, so it must be the same one again."""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from lmx.adapters.adapter import Adapter
from lmx.errors import UserError
from lmx.files import read_json, write_json
from lmx.models.model import cast_floats
from lmx.nn.kernel import plain
from lmx.nn.module import Params
from lmx.optim.names import name_of, put

MULTIPLIERS = (2654435761, 2246822519)
"""Odd, so that no change of one number's bits leaves a sum as it was."""


def checksum(params: Params) -> str:
    """16 hexadecimal digits that depend on every bit of float32 parameters, on their names and on nothing else: neither
    on the mesh, nor on the order in which it is summed."""
    sums = jax.device_get(jax.jit(_sums)(params))
    told = ((name_of(path), int(own)) for path, own in jax.tree.leaves_with_path(sums))
    return hashlib.sha256(json.dumps(sorted(told)).encode()).hexdigest()[:16]


def _sums(params: Params) -> Any:
    def one(leaf: jax.Array) -> tuple[jax.Array, ...]:
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        weighted = ((place * jnp.uint32(m) ^ (place >> 7)) * 2 + 1 for m in MULTIPLIERS)
        return tuple(jnp.sum(bits * weight, dtype=jnp.uint32) for weight in weighted)

    return jax.tree.map(one, params)


def check_base(file: Path, model: str, found: str) -> None:
    """Raises UserError unless ``found`` is the :func:`checksum` that ``file`` (see :func:`write_base`) tells.

    ``model`` is where the parameters come from, for the message.
    """
    if not file.exists():
        raise UserError(f"{file} is missing: it tells which model this run's adapter belongs to")
    told = read_json(file)["checksum"]
    if told != found:
        raise UserError(
            f"the model {model} is not the one that this run's adapter was trained beside (checksum {found}, expected "
            f"{told}); put that one back, or train another run"
        )


def write_base(file: Path, model: str, found: str) -> None:
    """Tells in ``file`` which model an adapter belongs to, with its :func:`checksum`."""
    write_json(file, {"model": model, "checksum": found})


def merge(adapter: Adapter, base: Params, axes: Params, own: Params) -> Params:
    """The parameters of a plain model that computes what a base does with what was trained beside it.

    Of a quantized base, its codes' values are what is merged into: what was trained.
    """
    params = put(adapter.adapt(base, axes, jax.random.key(0)), own)
    return cast(Params, cast_floats(plain(params), jnp.float32))
