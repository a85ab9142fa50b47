"""The cache of prepared data: keys, and files and directories that appear whole or not at all.

A process may be killed at any moment. So everything is written under a temporary name and renamed, and what a
killed process left behind is removed by the next one that holds the lock.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STORE_VERSION = 2  # part of every key: raise it when something under the cache is made otherwise


def cache_root(cache_dir: str) -> Path:
    """The directory for prepared data: ``cache_dir``, else ``$LMX_CACHE``, else ``~/.cache/lmx``."""
    return Path(cache_dir or os.environ.get("LMX_CACHE") or "~/.cache/lmx").expanduser().absolute()


def digest(*values: Any) -> str:
    """A hash of JSON-ready values, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def key(*values: Any) -> str:
    """The name under which what is made from ``values`` is cached, 16 hexadecimal digits."""
    return digest(STORE_VERSION, *values)[:16]


def read_json(file: Path) -> Any:
    """What :func:`write_json` wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, data: Any) -> None:
    """Writes JSON to a file that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(file)
    try:
        temporary.write_text(json.dumps(data), encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_dir(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` when the block ends, and vanishes when it raises."""
    temporary = _temporary(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds ``directory`` (made if absent) for this process; when the process dies, so does the lock."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.getLogger(__name__).warning("waiting for another process that prepares %s", directory)
            fcntl.flock(file, fcntl.LOCK_EX)
        _remove_leftovers(directory)
        yield


def _move(temporary: Path, target: Path) -> None:
    try:
        temporary.replace(target)
    except OSError:
        if not target.is_dir():  # else a worker of a killed process has made the same thing in the meantime
            raise


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _remove_leftovers(directory: Path) -> None:
    for leftover in directory.rglob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
