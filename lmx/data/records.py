"""Records of a TFDS dataset in ArrayRecord files, and the index of all that is asked of them without reading them."""

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lmx.data import cache, parts
from lmx.errors import UserError

ARRAYS = ("hashes", "contents", "sizes", "held_out", "groups")
"""Of each record: a hash of its text and of all that is learned from it, its bytes of text, whether it is held out by
its source, and a hash of what it is held out together with."""


@dataclass(frozen=True)
class Dataset:
    """Where ArrayRecord documents lie: TFDS directory and split, and the features for text and name; for the target of
    a pair, an example's content as JSON, what is held out, and what is held out together, where there are such."""

    directory: str
    split: str = "train"
    text_column: str = "text"
    name_column: str | None = "path"
    target_column: str | None = None
    example_column: str | None = None
    split_column: str | None = None
    group_column: str | None = None


@dataclass(frozen=True)
class RecordsPart:
    """Records ``start`` to ``stop`` of a dataset, whose result goes into the directory ``target``."""

    dataset: Dataset
    start: int
    stop: int
    size: int
    target: Path


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
    return _text(records[index], dataset, index)


def _text(record: Any, dataset: Dataset, index: int) -> tuple[str, str]:
    data, place = record[dataset.text_column], f"{dataset.directory}[{index}]"
    name = record[dataset.name_column].decode() if dataset.name_column else place
    try:
        return data.decode(), name
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not valid UTF-8 ({error}): convert it or leave it out") from error
    except AttributeError as error:
        raise UserError(f"{place}: {dataset.text_column!r} is {data!r:.60}, expected text: set text_column") from error


def write_index(dataset: Dataset, directory: Path, workers: int, progress: bool) -> None:
    """Indexes all records of a dataset in parts, and puts the whole into ``directory``.

    Raises:
      UserError: there are none, or all are blank.
    """
    count = len(open_records(dataset))
    if count == 0:
        raise UserError(
            f"{dataset.directory} has no documents in split {dataset.split!r}: give another split or source"
        )
    jobs = _even_parts(dataset, count, directory / "index")
    results = parts.run_parts(index_part, jobs, label="Indexing documents", workers=workers, progress=progress)
    arrays = {name: np.concatenate([np.load(job.target / f"{name}.npy") for job in jobs]) for name in ARRAYS}
    if not arrays["sizes"].any():
        raise UserError(f"every document of {dataset.directory} is blank: give files with text in them")
    for name, array in arrays.items():
        np.save(directory / f"{name}.npy", array)
    dropped = directory / "dropped.json"
    found = {label for job in jobs for label in cache.read_json(job.target / "classes.json")}
    meta = {
        "parts": results,
        "fingerprint": hashlib.sha256(arrays["contents"].tobytes()).hexdigest()[:32],
        "dropped": (cache.read_json(dropped) if dropped.exists() else 0) + int((arrays["sizes"] == 0).sum()),
        "classes": sorted(found, key=(lambda c: (len(c), c)) if all(c.isdecimal() for c in found) else None),
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
        source, dataset = open_records(part.dataset), part.dataset
        records = [source[i] for i in range(part.start, part.stop)]
        found = [_text(record, dataset, part.start + i) for i, record in enumerate(records)]
        data = [text.encode() for text, _ in found]
        more = dataset.example_column or dataset.target_column
        contents = [text + record[more] for text, record in zip(data, records, strict=True)] if more else data
        held_out = [bool(dataset.split_column) and r[dataset.split_column] == b"held_out" for r in records]
        groups = [r[dataset.group_column] for r in records] if dataset.group_column else data
        arrays = {
            "hashes": np.array([_hash(d) for d in data], np.uint64),
            "groups": np.array([_hash(g) for g in groups], np.uint64),
            "contents": np.array([_hash(c) for c in contents], np.uint64),
            "sizes": np.array([len(d) if d.strip() else 0 for d in data], np.int64),
            "held_out": np.array(held_out, bool),
        }
        with cache.whole_dir(part.target) as directory:
            for name, array in arrays.items():
                np.save(directory / f"{name}.npy", array)
            cache.write_json(directory / "classes.json", sorted(_classes(records, dataset.example_column)))
            cache.write_json(directory / "names.json", [name for _, name in found])
    return part.stop - part.start


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _classes(examples: Iterable[Any], column: str | None) -> set[str]:
    return {label for record in examples if column for label in json.loads(record[column]).get("labels", ())}
