"""Documents of a source: found or built as a TFDS dataset in ArrayRecord files, then indexed once.

The index holds, for each document, a hash of its text (which decides whether it is held out), its bytes and
its name.
"""

import functools
import hashlib
import io
import shutil
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lmx import config as configuration
from lmx.data import cache, parts
from lmx.data.config import AlignedFiles, Docstrings, LocalFiles, PythonStdlib, Source, Tfds
from lmx.errors import UserError

INFO = "dataset_info.json"
SOURCES = {
    PythonStdlib: "python_stdlib",
    LocalFiles: "local_files",
    Docstrings: "docstrings",
    AlignedFiles: "aligned_files",
}


@dataclass(frozen=True)
class Dataset:
    """Where ArrayRecord documents lie: TFDS directory and split, and the features for text and name."""

    directory: str
    split: str = "train"
    text_column: str = "text"
    name_column: str | None = "path"
    target_column: str | None = None


@dataclass(frozen=True)
class RecordsPart:
    """Records ``start`` to ``stop`` of a dataset, whose result goes into the directory ``target``."""

    dataset: Dataset
    start: int
    stop: int
    size: int
    target: Path


@dataclass(frozen=True)
class Documents:
    """The indexed documents of one source, in a fixed order.

    Attributes:
      name: what the source is called in reports.
      key: changes when the source's files do.
      fingerprint: a hash of all texts, the same on every machine.
      hashes: uint64 ``[documents]``, of the text.
      sizes: int64 ``[documents]``, bytes of UTF-8; 0 for a blank document, which takes no part in training.
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
    target = "target" if isinstance(source, Docstrings | AlignedFiles) else None
    dataset = found or Dataset(str(directory / SOURCES[type(source)] / "1.0.0"), target_column=target)
    meta = directory / "meta.json"
    if not meta.exists():
        with cache.locked(directory):
            if not meta.exists():
                if found is None:
                    _build(source, directory, workers, progress)
                _index(dataset, directory, workers, progress)
    return _open(Path(dataset.directory).parent.name, key, directory, dataset)


def _open(name: str, key: str, directory: Path, dataset: Dataset) -> Documents:
    meta = cache.read_json(directory / "meta.json")
    hashes, sizes = (np.load(directory / f"{n}.npy", mmap_mode="r") for n in ("hashes", "sizes"))
    starts = tuple(np.concatenate([[0], np.cumsum(meta["parts"])[:-1]]).astype(int).tolist())
    return Documents(name, key, directory, dataset, meta["fingerprint"], meta["dropped"], hashes, sizes, starts)


def _builder_class(source: Source) -> Any:
    from lmx.data.builders import aligned_files, docstrings, local_files, python_stdlib

    builders: dict[type[Source], Any] = {
        PythonStdlib: python_stdlib.PythonStdlib,
        LocalFiles: local_files.LocalFiles,
        Docstrings: docstrings.Docstrings,
        AlignedFiles: aligned_files.AlignedFiles,
    }
    return builders[type(source)]


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


@functools.lru_cache(maxsize=8)
def open_records(dataset: Dataset) -> Any:
    """The random-access data source of a dataset.

    Raises:
      UserError: the dataset has no such split.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(dataset.directory)
    try:
        return builder.as_data_source(dataset.split)
    except (ValueError, KeyError) as error:
        known = ", ".join(builder.info.splits) or "none"
        raise UserError(f"{dataset.directory} has no split {dataset.split!r} (it has {known}): set split") from error


def document_text(records: Any, dataset: Dataset, index: int) -> tuple[str, str]:
    """The text and the name of a record.

    Raises:
      UserError: its text is not valid UTF-8, or not text.
    """
    record = records[index]
    data, place = record[dataset.text_column], f"{dataset.directory}[{index}]"
    name = record[dataset.name_column].decode() if dataset.name_column else place
    try:
        return data.decode(), name
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not valid UTF-8 ({error}): convert it or leave it out") from error
    except AttributeError as error:
        raise UserError(f"{place}: {dataset.text_column!r} is {data!r:.60}, expected text: set text_column") from error


def _index(dataset: Dataset, directory: Path, workers: int, progress: bool) -> None:
    count = len(open_records(dataset))
    if count == 0:
        raise UserError(
            f"{dataset.directory} has no documents in split {dataset.split!r}: give another split or source"
        )
    jobs = _even_parts(dataset, count, directory / "index")
    results = parts.run_parts(index_part, jobs, label="Indexing documents", workers=workers, progress=progress)
    hashes, sizes = (np.concatenate([np.load(job.target / f"{n}.npy") for job in jobs]) for n in ("hashes", "sizes"))
    if not sizes.any():
        raise UserError(f"every document of {dataset.directory} is blank: give files with text in them")
    np.save(directory / "hashes.npy", hashes)
    np.save(directory / "sizes.npy", sizes)
    dropped = directory / "dropped.json"
    meta = {
        "parts": results,
        "fingerprint": hashlib.sha256(hashes.tobytes()).hexdigest()[:32],
        "dropped": (cache.read_json(dropped) if dropped.exists() else 0) + int((sizes == 0).sum()),
    }
    cache.write_json(directory / "meta.json", meta)


def _even_parts(dataset: Dataset, count: int, target: Path) -> list[RecordsPart]:
    files = (f for f in Path(dataset.directory).iterdir() if ".array_record" in f.name)
    # Text compresses to a third or less; a slice of a split has fewer records than its files, so this is a
    # guess.
    total = 3 * sum(f.stat().st_size for f in files)
    number = min(count, -(-total // parts.part_bytes(total)))
    edges = np.linspace(0, count, number + 1).astype(int).tolist()
    return [
        RecordsPart(dataset, a, b, total // number, target / f"{i:06d}") for i, (a, b) in enumerate(pairwise(edges))
    ]


def index_part(part: RecordsPart) -> int:
    """Indexes records unless that is done; returns their number."""
    if not part.target.exists():
        records = open_records(part.dataset)
        found = [document_text(records, part.dataset, i) for i in range(part.start, part.stop)]
        data = [text.encode() for text, _ in found]
        hashes = [int.from_bytes(hashlib.blake2b(d, digest_size=8).digest(), "little") for d in data]
        with cache.whole_dir(part.target) as directory:
            np.save(directory / "hashes.npy", np.array(hashes, np.uint64))
            np.save(directory / "sizes.npy", np.array([len(d) if d.strip() else 0 for d in data], np.int64))
            cache.write_json(directory / "names.json", [name for _, name in found])
    return part.stop - part.start
