"""Parameters to a Hugging Face directory, one tensor at a time; and what was written, read back."""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.checkpoint.huggingface.arrays import contiguous, same
from lmx.checkpoint.huggingface.files import NAMES, nbytes, write_file
from lmx.checkpoint.huggingface.plan import Holder, Plan, flat, make_plan
from lmx.checkpoint.huggingface.tensors import INDEX, SINGLE, find_tensors, some
from lmx.errors import LmxError, UserError
from lmx.files import check_reachable
from lmx.models.config import ModelConfig
from lmx.nn.module import Params

SHARD_BYTES = 5 * 10**9


def export_params(
    config: ModelConfig,
    params: Params,
    directory: str | os.PathLike[str],
    config_json: Mapping[str, Any],
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as a Hugging Face directory, and reads it back.

    The directory appears whole or not at all; :func:`new_directory`, :func:`write_tensors`, :func:`write_json` and
    :func:`verify_tensors` do the same in steps, for those who put more into it.

    Args:
      config: the model's.
      params: arrays in the shapes of ``lmx.models.model.param_shapes``.
      directory: new or empty.
      config_json: the content of its ``config.json``.
      dtype: of the tensors; None keeps each parameter's own.
      shard_bytes: a file with more tensors than this is split; a larger tensor has a file of its own.

    Raises:
      UserError: the directory has something in it, or a dtype that safetensors does not know.
      LmxError: what was read back is not what was written.
    """
    with new_directory(Path(directory)) as folder:
        write_tensors(config, params, folder, dtype=dtype, shard_bytes=shard_bytes)
        write_json(folder / "config.json", config_json)
        verify_tensors(config, params, folder, dtype=dtype)


def export_tensors(config: ModelConfig, params: Params, dtype: Any = None) -> dict[str, np.ndarray]:
    """The tensors that hold these parameters, by name: the inverse of ``import_tensors``."""
    arrays = flat(params)
    plan = make_plan(config)
    infos = _infos(plan, arrays, dtype)
    return {name: _tensor(holder, arrays, infos[name]) for name, holder in plan.holders.items()}


def write_tensors(
    config: ModelConfig, params: Params, folder: Path, *, dtype: Any = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes ``model.safetensors``, or shards and their index; see :func:`export_params`."""
    plan, arrays = make_plan(config), flat(params)
    infos = _infos(plan, arrays, dtype)
    write_shards(folder, infos, lambda name: _tensor(plan.holders[name], arrays, infos[name]), shard_bytes)


def write_shards(
    folder: Path,
    infos: Mapping[str, jax.ShapeDtypeStruct],
    content: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes ``model.safetensors``, or shards and their index, asking for the content of one tensor after the other."""
    shards = _shards(infos, shard_bytes)
    files = [SINGLE] if len(shards) == 1 else _numbered(len(shards))
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, {name: infos[name] for name in names}, content)
    if len(shards) > 1:
        total = {"total_size": sum(nbytes(info) for info in infos.values())}
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": total, "weight_map": dict(sorted(where.items()))})


def verify_tensors(config: ModelConfig, params: Params, folder: Path, *, dtype: Any = None) -> None:
    """Reads every tensor back and compares it with what was to be written, byte for byte.

    Raises:
      UserError: a file that is missing or not whole.
      LmxError: tensors that are missing, unexpected, of another shape or dtype, or of other content, by name.
    """
    plan, arrays, tensors = make_plan(config), flat(params), find_tensors(folder)
    infos = _infos(plan, arrays, dtype)
    problems = {
        "are missing": [name for name in infos if name not in tensors],
        "are not of the model": [name for name in tensors if name not in infos],
        "have another shape or dtype": [n for n in infos if n in tensors and tensors.info(n) != infos[n]],
    }
    if not any(problems.values()):
        problems["have other content"] = [
            name
            for name, holder in plan.holders.items()
            if not same(tensors.read(name), _tensor(holder, arrays, infos[name]))
        ]
    found = [f"{some(names)} {what}" for what, names in problems.items() if names]
    if found:
        raise LmxError(f"what was written to {folder} is not the model: {'; '.join(found)}")


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill, beside ``directory``; it takes that name when the block ends, and goes if it fails.

    Raises:
      UserError: ``directory`` is there and has something in it, or cannot be made.
    """
    check_reachable(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} is there already; give a directory that is new or empty")
    folder = directory.parent / f".{directory.name}.{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
        os.replace(folder, directory)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file for people and programs to read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _infos(plan: Plan, arrays: Mapping[str, Any], dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    infos = {}
    for name, holder in plan.holders.items():
        own = functools.reduce(jnp.promote_types, (arrays[place.path].dtype for place in holder.places))
        kind = np.dtype(own if dtype is None else dtype)
        if kind not in NAMES:
            known = ", ".join(map(str, NAMES))
            raise UserError(f"{name} has the dtype {kind}, which safetensors files cannot hold; choose one of {known}")
        infos[name] = jax.ShapeDtypeStruct(holder.shape, kind)
    return infos


def _tensor(holder: Holder, arrays: Mapping[str, Any], info: jax.ShapeDtypeStruct) -> np.ndarray:
    pieces = [_piece(arrays[place.path], place.index) for place in holder.places]
    return contiguous(holder.stored.join(pieces), np.dtype(info.dtype))


def _piece(array: Any, index: Any) -> np.ndarray:
    """A part of an array. Only that part comes to the host, and it is not kept there. What lies there already is read
    in place: an index of JAX's is a program for every shape."""
    on_host = isinstance(array, jax.Array) and {device.platform for device in array.devices()} == {"cpu"}
    in_place = on_host and array.is_fully_replicated
    return np.asarray((np.asarray(array) if in_place else array)[index])


def _shards(infos: Mapping[str, jax.ShapeDtypeStruct], most: int) -> list[list[str]]:
    """The names, in order, in lists of at most ``most`` bytes or of a single tensor."""
    shards: list[list[str]] = [[]]
    room = most
    for name, info in infos.items():
        if nbytes(info) > room and shards[-1]:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= nbytes(info)
    return shards


def _numbered(count: int) -> list[str]:
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
