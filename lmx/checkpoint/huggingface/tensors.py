"""The tensors of a checkpoint, looked at before they are read: in a directory's files, or in memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from lmx.checkpoint.huggingface.files import Entry, read_header
from lmx.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Tensors(Protocol):
    """A checkpoint's tensors by name."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object, /) -> bool: ...

    def info(self, name: str) -> jax.ShapeDtypeStruct:
        """A tensor's shape and dtype, without reading it."""

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or a range of its rows."""


class InMemory(dict[str, np.ndarray]):
    """Arrays as a checkpoint's tensors."""

    def info(self, name: str) -> jax.ShapeDtypeStruct:
        """A tensor's shape and dtype."""
        return jax.ShapeDtypeStruct(self[name].shape, self[name].dtype)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or a range of its rows."""
        return np.asarray(self[name])[rows] if self[name].shape else np.asarray(self[name])


class InFiles(dict[str, Entry]):
    """Tensors of safetensors files, of which nothing stays in memory."""

    def info(self, name: str) -> jax.ShapeDtypeStruct:
        """A tensor's shape and dtype, from the file's header."""
        return jax.ShapeDtypeStruct(self[name].shape, self[name].dtype)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or a range of its rows, in memory of its own."""
        return self[name].read(rows)


def find_tensors(directory: Path) -> InFiles:
    """The tensors of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` names.

    Raises:
      UserError: no such file, shards that are missing or do not hold what the index says, or a file that is not whole.
    """
    if (directory / SINGLE).is_file():
        return InFiles(read_header(directory / SINGLE))
    if not (directory / INDEX).is_file():
        raise _no_tensors(directory)
    index = _read_index(directory / INDEX)
    shards = sorted(set(index.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise UserError(
            f"{directory} lacks {some(missing)} of the {len(shards)} files that its {INDEX} names; download them"
        )
    headers = {shard: read_header(directory / shard) for shard in shards}
    absent = [name for name, shard in index.items() if name not in headers[shard]]
    if absent:
        raise UserError(f"the files of {directory} lack {some(absent)}, which its {INDEX} names; download it again")
    return InFiles({name: headers[shard][name] for name, shard in index.items()})


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises UserError if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, expected an object; download it again")
    return content


def some(names: list[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    # A shard is a file beside the index: a downloaded index does not choose other files to read.
    if not isinstance(index, dict) or not all(isinstance(f, str) and Path(f).name == f for f in index.values()):
        raise UserError(f"{path} has no weight_map from tensors to files beside it; download it again")
    return index


def _no_tensors(directory: Path) -> UserError:
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if not pickles:
        return UserError(f"{directory} has neither {SINGLE} nor {INDEX}; is it a Hugging Face model directory?")
    return UserError(
        f"{directory} has its tensors in {some(pickles)} only, a pickle that can run any code when it is read; convert "
        f"it to {SINGLE} with the safetensors library where you trust it, or take a revision that has one"
    )
