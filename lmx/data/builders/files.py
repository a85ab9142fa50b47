"""Which files a source reads. Apart from the builders, so that finding a corpus prepared needs no TFDS."""

import glob
import os
import sysconfig

from lmx.data import config
from lmx.errors import UserError

SKIPPED = {"site-packages", "dist-packages", "__pycache__"}


def stdlib_root() -> str:
    """The directory of the running interpreter's standard library."""
    return sysconfig.get_paths()["stdlib"]


def stdlib_files() -> list[str]:
    """The modules of the standard library, tests included, sorted."""
    found: list[str] = []
    for directory, folders, files in os.walk(stdlib_root()):
        folders[:] = [f for f in folders if f not in SKIPPED]
        found += [os.path.join(directory, f) for f in files if f.endswith(".py")]
    return sorted(found)


def listed(source: config.Source) -> list[str]:
    """The files that a source reads.

    Raises:
      UserError: see :func:`matched_files` and :func:`aligned`.
    """
    if isinstance(source, config.PythonStdlib):
        return stdlib_files()
    if isinstance(source, config.AlignedFiles):
        return [path for pair in aligned(source) for path in pair]
    assert isinstance(source, config.LocalFiles)
    return matched_files(source)


def aligned(source: config.AlignedFiles) -> list[tuple[str, str]]:
    """The files of ``source``, each with that of its targets.

    Raises:
      UserError: see :func:`matched_files`; or there are more of the one than of the other.
    """
    sources, targets = (matched_files(config.LocalFiles(files=f)) for f in (source.files, source.target_files))
    if len(sources) != len(targets):
        raise UserError(
            f"AlignedFiles has {len(sources)} files but {len(targets)} target_files: give as many of each, in the same "
            "sorted order"
        )
    return list(zip(sources, targets, strict=True))


def matched_files(source: config.LocalFiles) -> list[str]:
    """The files that the patterns of ``source`` name, absolute, sorted, each once.

    Raises:
      UserError: there are no patterns, a pattern matches nothing, or a file cannot be read.
    """
    if not source.files:
        raise UserError('LocalFiles has no files: set files to paths or globs, such as ("texts/*.txt",)')
    found = sorted({path for pattern in source.files for path in _matches(pattern)})
    for path in found:
        if not os.access(path, os.R_OK):
            raise UserError(f"{path} cannot be read: give it read permission or leave it out of the files")
    return found


def _matches(pattern: str) -> list[str]:
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        expanded = os.path.join(glob.escape(expanded), "**", "*")
    # A name with brackets or stars in it is a file before it is a pattern.
    candidates = [expanded] if os.path.isfile(expanded) else glob.glob(expanded, recursive=True)
    matches = [os.path.abspath(path) for path in candidates if os.path.isfile(path)]
    if not matches:
        raise UserError(f"no file matches {pattern!r} (in {os.getcwd()}): give an existing file, directory or glob")
    return matches


def signature(path: str) -> tuple[str, int, int]:
    """What changes when a file does: its path, bytes and time of change."""
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns
