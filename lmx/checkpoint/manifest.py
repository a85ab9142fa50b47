"""The manifest of a checkpoint: the size and SHA-256 of each of its files, written last.

A storage layer can hand back a truncated file or a flipped bit without a word, so a step counts as saved only
once its ``manifest.json`` stands beside its data, and is loaded only when every file still agrees with it.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epath

from lmx.files import is_local, write_durably

FILE = "manifest.json"


class Entry(NamedTuple):
    """What the manifest says of one file."""

    bytes: int
    sha256: str


def write(directory: epath.Path, step: int) -> None:
    """Flushes every file below ``directory`` to the disk and writes the manifest that vouches for them."""
    names = _files(directory)
    digests = _in_threads(functools.partial(_digest, directory, flush=True), names)
    files = {n: Entry(_size(directory / n), d)._asdict() for n, d in zip(names, digests, strict=True)}
    write_durably(directory / FILE, _text({"step": step, "files": files}))


def exists(directory: epath.Path) -> bool:
    """Whether ``directory`` has a manifest, which says that it was saved to the end."""
    return (directory / FILE).exists()


def problem(directory: epath.Path, step: int, part: int = 0, parts: int = 1) -> str | None:
    """The first reason to distrust the data of ``step``, or ``None`` when every byte is as it was saved.

    Args:
      directory: the step's directory.
      step: the step that it should hold.
      part: which share of the files this process reads, of ``parts`` equal ones.
    """
    try:
        manifest = _read(directory, step)
    except FileNotFoundError:
        return f"{FILE} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{FILE} is damaged ({error})"
    names = sorted(manifest)
    sizes = (_size_problem(directory, n, manifest[n]) for n in names)
    found = next(filter(None, sizes), None)
    if found is not None:
        return found
    check = functools.partial(_content_problem, directory, manifest)
    return next(filter(None, _in_threads(check, names[part::parts])), None)


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


def _read(directory: epath.Path, step: int) -> dict[str, Entry]:
    text = (directory / FILE).read_bytes().decode("utf-8")
    manifest = json.loads(text)
    if _text(manifest) != text:
        raise ValueError("its text is not as it was written")
    if manifest["step"] != step:
        raise ValueError(f"it belongs to step {manifest['step']}")
    return {name: Entry(**entry) for name, entry in manifest["files"].items()}


def _files(directory: epath.Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in _walk(directory) if p.name != FILE)


def _walk(directory: epath.Path) -> Iterator[epath.Path]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _size(path: epath.Path) -> int:
    return int(path.stat().length)


def _digest(directory: epath.Path, name: str, *, flush: bool = False) -> str:
    path = directory / name
    with path.open("rb") as file:
        if flush and is_local(path):
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size_problem(directory: epath.Path, name: str, entry: Entry) -> str | None:
    try:
        size = _size(directory / name)
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return None if size == entry.bytes else f"{name} has {size} bytes, expected {entry.bytes}"


def _content_problem(directory: epath.Path, manifest: dict[str, Entry], name: str) -> str | None:
    try:
        digest = _digest(directory, name)
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return None if digest == manifest[name].sha256 else f"the content of {name} changed after it was saved"


def _in_threads(function: Callable[[str], Any], names: list[str]) -> list[Any]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, names))
