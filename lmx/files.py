"""Files that appear whole or not at all, whatever ends the process or the machine."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from lmx.errors import UserError

AnyPath = str | os.PathLike[str]


def write_durably(path: AnyPath, text: str) -> None:
    """Writes ``text``: a crash leaves the old file or the whole new one, and a finished write survives it.

    Raises:
      OSError: it could not be written; the old file is as it was.
    """
    target = epath.Path(path)
    if not is_local(path):
        target.write_text(text)  # an object appears whole or not at all
        return
    temporary = f"{target}.tmp"
    with naming(target), open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    for folder in (target.parent, target.parent.parent):
        _flush_directory(folder)


def write_file(path: AnyPath, text: str) -> None:
    """Writes a file for people, and makes the directories that it lacks."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


@contextmanager
def naming(path: AnyPath) -> Iterator[None]:
    """Within the block an OSError that names no file, as those of writes, gets the name of this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def check_reachable(path: AnyPath, what: str = "") -> None:
    """Checks that a file or directory can be made at a path, with what is above it, before there is work to lose.

    ``what`` is how a sentence calls it, by default the path.

    Raises:
      UserError: something that is no directory stands above it, or one that may not be written to.
    """
    if not is_local(path):
        return
    above = next(parent for parent in Path(path).absolute().parents if os.path.lexists(parent))
    if not os.path.isdir(above):
        raise UserError(f"{what or path} cannot be written: {above} is no directory; choose another path")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{what or path} cannot be written: you may not write to {above}; choose another path")


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON that every parser takes: numbers that are not finite, for which it has no word, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: AnyPath, value: Any) -> None:
    """Writes JSON (see :func:`json_text`) for people to read too, durably."""
    write_durably(path, json_text(value, indent=2) + "\n")


def read_json(path: AnyPath) -> Any:
    """What a JSON file holds.

    Raises:
      UserError: it is not JSON: something else wrote it, or the disk lost a part of it.
    """
    try:
        return json.loads(epath.Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged, expected JSON: {error}; put it back from a copy, or delete it") from error


def is_local(path: AnyPath) -> bool:
    """Whether ``path`` is on a file system and not in an object store."""
    return "://" not in os.fspath(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flush_directory(path: AnyPath) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
