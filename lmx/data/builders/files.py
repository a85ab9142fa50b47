"""Which files a source reads. Apart from the builders, so that finding a corpus prepared needs no TFDS."""

import glob
import os
import sysconfig
from pathlib import Path

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
      UserError: see :func:`matched_files`, :func:`aligned` and :func:`aligned_pages`.
    """
    if isinstance(source, config.PythonStdlib):
        return stdlib_files()
    if isinstance(source, config.AlignedFiles):
        return [path for pair in aligned(source) for path in pair]
    if isinstance(source, config.AlignedPages):
        return [path for pair in aligned_pages(source) for path in pair]
    if isinstance(source, config.Examples):
        found = [*example_files(source), *example_files(source, held_out=True)]
        return [file for path in found for file in (_contents(path) if is_dataset(path) else [path])]
    assert isinstance(source, config.LocalFiles)
    return matched_files(source)


def example_files(source: config.Examples, *, held_out: bool = False) -> list[str]:
    """The files of a source of examples, or those that are held out; a directory of a TFDS dataset stands for itself.

    Raises:
      UserError: see :func:`matched_files`.
    """
    patterns = source.held_out_files if held_out else source.files
    if held_out and not patterns:
        return []
    datasets = [p for p in patterns if is_dataset(os.path.expanduser(p))]
    others = tuple(p for p in patterns if p not in datasets)
    whole = [os.path.abspath(os.path.expanduser(p)) for p in datasets]
    name = type(source).__name__
    return sorted(whole + (matched_files(config.LocalFiles(files=others), name) if others or not whole else []))


def is_dataset(path: str) -> bool:
    """Whether a path is the directory of a prepared TFDS dataset."""
    return os.path.isfile(os.path.join(path, "dataset_info.json"))


def _contents(directory: str) -> list[str]:
    return sorted(entry.path for entry in os.scandir(directory) if entry.is_file())


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


def aligned_pages(source: config.AlignedPages) -> list[tuple[str, str]]:
    """The pages that both directories have, sorted.

    Raises:
      UserError: a directory is missing, or they have no page in common.
    """
    found = []
    for name in ("directory", "target_directory"):
        directory = Path(getattr(source, name)).expanduser()
        if not getattr(source, name) or not directory.is_dir():
            raise UserError(
                f"{name} of AlignedPages is {getattr(source, name)!r}, which is no directory: give one of HTML pages "
                "(Debian's libreoffice-help-en-us and libreoffice-help-de install some)"
            )
        found.append({path.relative_to(directory).as_posix(): path.absolute() for path in directory.rglob("*.html")})
    sources, targets = found
    if not sources.keys() & targets.keys():
        raise UserError(
            f"{source.directory} and {source.target_directory} have no .html file of the same name in common: give the "
            "directories of the same pages in two languages"
        )
    return [(str(sources[name]), str(targets[name])) for name in sorted(sources.keys() & targets.keys())]


def matched_files(source: config.LocalFiles, name: str = "LocalFiles") -> list[str]:
    """The files that the patterns of ``source`` name, absolute, sorted, each once; mistakes call it ``name``.

    Raises:
      UserError: there are no patterns, a pattern matches nothing, or a file cannot be read.
    """
    if not source.files:
        raise UserError(f'{name} has no files: set files to paths or globs, such as ("texts/*.txt",)')
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
