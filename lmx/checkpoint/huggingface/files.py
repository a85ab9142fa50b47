"""Safetensors files: read by ranges of rows, and written one tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: each tensor's dtype, shape and range of
bytes), and the bytes. The safetensors library maps a file into memory, where every page that was read counts as the
process's own, and writes only from memory; so that neither ever holds a model, both are done here with plain reads and
writes.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from lmx.errors import UserError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its dtype and shape, and the file's byte at which it starts."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or a range of its rows, in memory of its own."""
        first, last, _ = rows.indices(self.shape[0]) if self.shape else (0, 1, 1)
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        row = self.dtype.itemsize * math.prod(self.shape[1:])
        raw = np.fromfile(self.path, np.uint8, count=(last - first) * row, offset=self.start + first * row)
        if raw.size != (last - first) * row:
            raise corrupt(self.path, "it ends within a tensor")
        return raw.view(self.dtype).reshape(shape)


def corrupt(path: Path, why: str) -> UserError:
    """The error for a file that is not what it should be."""
    return UserError(f"{path} is not a whole safetensors file: {why}; download or write it again")


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by name, without reading them.

    Raises:
      UserError: a truncated file, a header that is not JSON, an unknown dtype, or ranges of bytes that do not fit the
        shapes, each other, or the file.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise corrupt(path, f"it has {size} bytes, too few for its header")
        text = file.read(length)
    try:
        header = json.loads(text.decode())
        fields = {name: _fields(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise corrupt(path, f"its header cannot be understood ({type(error).__name__}: {error})") from error
    entries = {name: Entry(path, dtype, shape, 8 + length + start) for name, (dtype, shape, start, _) in fields.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        _, _, start, stop = fields[name]
        if stop - start != entry.nbytes:
            raise corrupt(path, f"{name} {list(entry.shape)} takes {entry.nbytes} bytes, but has {stop - start}")
        if entry.start != end:
            raise corrupt(path, f"{name} starts at byte {entry.start}, expected {end}")
        end += entry.nbytes
    if end != size:
        raise corrupt(path, f"its tensors end at byte {end}, but it has {size} bytes")
    return entries


def _fields(entry: Mapping[str, Any]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte. Raises ValueError, KeyError or TypeError if it is not such an entry."""
    (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"shape {shape} and bytes {start} to {stop}")
    return np.dtype(DTYPES[entry["dtype"]]), shape, start, stop


def write_file(path: Path, tensors: Mapping[str, jax.ShapeDtypeStruct], content: Callable[[str], np.ndarray]) -> None:
    """Writes a file with the tensors described by ``tensors``, each taken from ``content`` when it is its turn.

    It is flushed to the disk before this returns. The metadata say ``format: pt``, which transformers asks for.
    """
    # Larger items first: every tensor is then aligned to its items, as readers that map the file expect.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + nbytes(tensors[name])
        dtype, shape = NAMES[np.dtype(tensors[name].dtype)], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(content(name)).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def nbytes(tensor: jax.ShapeDtypeStruct) -> int:
    """A tensor's size in bytes."""
    return int(math.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
