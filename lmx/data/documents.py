"""Documents of a source: found or built as a TFDS dataset in ArrayRecord files, then indexed once.

The index holds, for each document, a hash of its text (which decides whether it is held out), its bytes and
its name.
"""

import importlib
import io
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lmx import config as configuration
from lmx.data import cache
from lmx.data.config import (
    AlignedFiles,
    AlignedPages,
    Answers,
    Chats,
    Docstrings,
    LabelledTexts,
    LocalFiles,
    Preferences,
    PreferredChats,
    PythonStdlib,
    RatedTexts,
    Source,
    StdlibChats,
    StdlibModules,
    StdlibPreferences,
    TaggedWords,
    TextPairs,
    Tfds,
)
from lmx.data.records import Dataset, RecordsPart, document_text, open_records, write_index
from lmx.errors import UserError

INFO = "dataset_info.json"
Kind = Literal["texts", "pairs", "classes", "numbers", "tags", "answers", "chats", "preferences"]
"""What documents are: texts alone, or examples with something to learn."""


class Form(NamedTuple):
    """How the documents of a source are built, by the dataset's name; the kind that they are of; and the columns that
    say what is held out, or what is held out together."""

    dataset: str
    kind: Kind
    split: str | None = None
    group: str | None = None


SOURCES: dict[type[Source], Form] = {
    PythonStdlib: Form("python_stdlib", "texts"),
    LocalFiles: Form("local_files", "texts"),
    Docstrings: Form("docstrings", "pairs"),
    AlignedFiles: Form("aligned_files", "pairs"),
    AlignedPages: Form("aligned_pages", "pairs", group="page"),
    TextPairs: Form("pairs", "pairs", "split"),
    LabelledTexts: Form("examples", "classes", "split"),
    StdlibPreferences: Form("stdlib_preferences", "preferences"),
    StdlibModules: Form("stdlib_modules", "classes"),
    RatedTexts: Form("examples", "numbers", "split"),
    TaggedWords: Form("examples", "tags", "split"),
    Answers: Form("examples", "answers", "split"),
    Chats: Form("examples", "chats", "split"),
    StdlibChats: Form("stdlib_chats", "chats"),
    Preferences: Form("examples", "preferences", "split"),
    PreferredChats: Form("examples", "preferences", "split"),
}


@dataclass(frozen=True)
class Documents:
    """The indexed documents of one source, in a fixed order.

    Attributes:
      name: what the source is called in reports.
      key: changes when the source's files do.
      fingerprint: a hash of all texts, the same on every machine.
      hashes: uint64 ``[documents]``, of the text.
      sizes: int64 ``[documents]``, bytes of UTF-8; 0 for a blank document, which takes no part in training.
      kind: what they are.
      classes: the names of the classes, where there are such.
      given: bool ``[documents]``, what is held out, where the source says so.
      groups: uint64 ``[documents]``, a hash of what is held out together, such as a page, where there is such.
    """

    name: str
    key: str
    directory: Path
    dataset: Dataset
    fingerprint: str
    dropped: int
    hashes: np.ndarray
    sizes: np.ndarray
    _part_starts: tuple[int, ...]
    kind: Kind = "texts"
    classes: tuple[str, ...] = ()
    given: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def targets(self) -> "Documents | None":
        """Where documents are pairs: the same documents, with their targets for texts."""
        if self.dataset.target_column is None:
            return None
        dataset = replace(self.dataset, text_column=self.dataset.target_column, target_column=None)
        return replace(self, key=f"{self.key}-target", dataset=dataset)

    def texts(self, indices: Iterable[int]) -> Iterator[str]:
        """The texts of documents, read as they are asked for."""
        records = open_records(self.dataset)
        for index in indices:
            yield document_text(records, self.dataset, int(index))[0]

    def document_name(self, index: int) -> str:
        """The name of a document: its path, and the place in it where a file holds several."""
        part = int(np.searchsorted(self._part_starts, index, side="right")) - 1
        names = cache.read_json(self.directory / "index" / f"{part:06d}" / "names.json")
        return names[index - self._part_starts[part]]

    def record_parts(self, target: Path) -> list[RecordsPart]:
        """All records in parts of about equal size, for results under ``target``; needs no reading."""
        starts = (*self._part_starts, len(self))
        return [
            RecordsPart(self.dataset, a, b, int(self.sizes[a:b].sum()), target / f"{i:06d}")
            for i, (a, b) in enumerate(pairwise(starts))
        ]


def prepare_documents(source: Source, root: Path, *, workers: int = 0, progress: bool = True) -> Documents:
    """Builds (where needed) and indexes the documents of ``source`` under the cache directory ``root``.

    Raises:
      UserError: the source is empty, cannot be read or is not text.
    """
    found = _find_tfds(source) if isinstance(source, Tfds) else None
    key = _tfds_key(found) if found else _files_key(source)
    directory = root / "documents" / key
    dataset = found or _built(source, directory)
    meta = directory / "meta.json"
    if not meta.exists():
        with cache.locked(directory):
            if not meta.exists():
                if found is None:
                    _build(source, directory, workers, progress)
                write_index(dataset, directory, workers, progress)
    name = Path(dataset.directory).parent.name if found else _snake(type(source).__name__)
    return _open(name, key, directory, dataset, source)


def _built(source: Source, directory: Path) -> Dataset:
    """Where the documents of a source are built."""
    dataset, kind, split, group = SOURCES[type(source)]
    path = str(directory / dataset / "1.0.0")
    if kind == "texts":
        return Dataset(path)
    if kind == "pairs":
        return Dataset(path, target_column="target", split_column=split, group_column=group)
    return Dataset(path, example_column="example", split_column=split)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _open(name: str, key: str, directory: Path, dataset: Dataset, source: Source) -> Documents:
    meta = cache.read_json(directory / "meta.json")
    hashes, sizes = (np.load(directory / f"{n}.npy", mmap_mode="r") for n in ("hashes", "sizes"))
    starts = tuple(np.concatenate([[0], np.cumsum(meta["parts"])[:-1]]).astype(int).tolist())
    given = np.load(directory / "held_out.npy") if dataset.split_column else None
    return Documents(
        name,
        key,
        directory,
        dataset,
        meta["fingerprint"],
        meta["dropped"],
        hashes,
        sizes,
        starts,
        SOURCES[type(source)].kind if type(source) in SOURCES else "texts",
        getattr(source, "classes", ()) or tuple(meta.get("classes", ())),
        given if given is not None and given.any() else None,
        np.load(directory / "groups.npy") if dataset.group_column else None,
    )


def _builder_class(source: Source) -> Any:
    name = SOURCES[type(source)].dataset
    module = "examples" if name == "pairs" else name
    return getattr(importlib.import_module(f"lmx.data.builders.{module}"), name.title().replace("_", ""))


def _files_key(source: Source) -> str:
    if type(source) not in SOURCES:
        known = ", ".join(cls.__name__ for cls in SOURCES)
        raise UserError(f"{type(source).__name__} is no source of documents: use {known} or Tfds")
    from lmx.data.builders import files

    listed = files.listed(source)
    return cache.key(configuration.to_data(replace(source, weight=1.0)), [files.signature(f) for f in listed])


def _build(source: Source, directory: Path, workers: int, progress: bool) -> None:
    builder = _builder_class(source)(source=source, data_dir=str(directory), workers=workers, progress=progress)
    for leftover in directory.glob("*/incomplete.*"):  # of a killed process
        shutil.rmtree(leftover)
    with redirect_stdout(io.StringIO()):  # TFDS announces itself; the progress bar is on standard error
        builder.download_and_prepare(download_dir=str(directory / "downloads"))
    shutil.rmtree(directory / "parts", ignore_errors=True)


def _find_tfds(source: Tfds) -> Dataset:
    directory = Path(source.name).expanduser()
    if not source.name:
        raise UserError("Tfds has no name: set name to the directory of a prepared dataset or to a TFDS name")
    if not (directory / INFO).exists():
        directory = _named_tfds(source)
    info = cache.read_json(directory / INFO)
    if info.get("fileFormat") != "array_record":
        raise UserError(
            f"{directory} is a TFDS dataset in {info.get('fileFormat', 'tfrecord')} files, which "
            "need TensorFlow: "
            'prepare it with download_and_prepare(file_format="array_record")'
        )
    if (columns := _columns(directory)) and source.text_column not in columns:
        raise UserError(
            f"{directory} has no feature {source.text_column!r} (it has {', '.join(columns)}): set text_column"
        )
    name_column = "path" if "path" in columns else None
    return Dataset(str(directory.absolute()), source.split, source.text_column, name_column)


def _columns(directory: Path) -> list[str]:
    file = directory / "features.json"
    return list(cache.read_json(file).get("featuresDict", {}).get("features", {})) if file.exists() else []


def _named_tfds(source: Tfds) -> Path:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(source.name, data_dir=source.data_dir or None, file_format="array_record")
        with redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # a catalogue builder can fail in any way: no TensorFlow, no network, no such name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the TFDS dataset {source.name!r} cannot be loaded without TensorFlow ({reason}): "
            "prepare it elsewhere "
            'with file_format="array_record" and set name to its directory'
        ) from error
    return Path(builder.data_dir)


def _tfds_key(dataset: Dataset) -> str:
    directory = Path(dataset.directory)
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(directory.iterdir())]
    return cache.key("tfds", dataset.directory, dataset.split, dataset.text_column, files)
