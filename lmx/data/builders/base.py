"""A TFDS builder that writes its shards in parts: in parallel, and resumable after any interruption."""

import abc
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_builder, example_serializer, splits, writer

from lmx.data import cache, parts
from lmx.data.builders.span import Span
from lmx.data.config import Source
from lmx.errors import UserError

RECORDS = "records.array_record"


@dataclass(frozen=True)
class WritePart:
    """The work of writing one shard into the directory ``target``."""

    builder: "type[DocumentsBuilder]"
    source: Source
    spans: tuple[Span, ...]
    target: Path

    @property
    def size(self) -> int:
        """Bytes of the files that are read."""
        return sum(span.size for span in self.spans)


def write_part(part: WritePart) -> dict[str, int]:
    """Writes one shard unless it is there; returns its counts of ``documents``, ``bytes``, ``dropped``."""
    if not (part.target / RECORDS).exists():  # it is moved away when all are written
        shutil.rmtree(part.target, ignore_errors=True)
        with cache.whole_dir(part.target) as directory:
            counts = _write_records(part, directory / RECORDS)
            cache.write_json(directory / "counts.json", counts)
    return cache.read_json(part.target / "counts.json")


def _write_records(part: WritePart, file: Path) -> dict[str, int]:
    counts = {"documents": 0, "bytes": 0, "dropped": 0}
    features = part.builder.features()
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialized() -> Iterator[tuple[int, bytes]]:
        for span in part.spans:
            for record in part.builder.records(part.source, span):
                if record is None:
                    counts["dropped"] += 1
                    continue
                data = serializer.serialize_example(features.encode_example(record))
                yield counts["documents"], data
                counts["documents"] += 1
                counts["bytes"] += len(data)

    writer.ExampleWriter(file_format=tfds.core.FileFormat.ARRAY_RECORD).write(file, serialized())
    return counts


class _OwnInfo(tfds.core.DatasetInfo):
    """Of a dataset that is only here."""

    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS would look for it in its bucket, and leave a temporary directory."""


class DocumentsBuilder(dataset_builder.FileReaderBuilder):
    """Documents of one source as a TFDS dataset with the single split ``train``, in the order of the source.

    TFDS's own generator-based builders run in one process, start again from nothing and shuffle by key.
    """

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: ClassVar[tuple[str, ...]] = ("text", "path")
    # Told, not found: TFDS looks for them with importlib_resources, which it does not install.
    code_path = epath.Path(__file__)
    pkg_dir_path = epath.Path(__file__).parent

    def __init__(self, *, source: Source, workers: int = 0, progress: bool = True, **kwargs: Any) -> None:
        self._source, self._workers, self._progress = source, workers, progress
        super().__init__(file_format="array_record", **kwargs)

    @classmethod
    @abc.abstractmethod
    def spans(cls, source: Any) -> list[Span]:
        """The files of ``source``, in stretches that can be read apart, in order."""

    @classmethod
    @abc.abstractmethod
    def records(cls, source: Any, span: Span) -> Iterator[dict[str, str] | None]:
        """The documents of a stretch, in order; None stands for one that was dropped."""

    @classmethod
    def features(cls) -> tfds.features.FeaturesDict:
        """Every feature is text."""
        return tfds.features.FeaturesDict({name: tfds.features.Text() for name in cls.FEATURES})

    def _info(self) -> tfds.core.DatasetInfo:
        return _OwnInfo(builder=self, features=self.features(), description=str(type(self).__doc__))

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        spans = self.spans(self._source)
        groups = parts.group(spans, parts.part_bytes(sum(span.size for span in spans)))
        staging = Path(self.data_dir_root) / "parts"
        jobs = [WritePart(type(self), self._source, g, staging / f"{i:06d}") for i, g in enumerate(groups)]
        counts = parts.run_parts(
            write_part, jobs, label=f"Reading {self.name}", workers=self._workers, progress=self._progress
        )
        if not any(count["documents"] for count in counts):
            raise UserError(f"there are no documents with text in {self._source}: give files that hold some")
        kept = [(job, count) for job, count in zip(jobs, counts, strict=True) if count["documents"]]
        template = self._get_filename_template(split_name="train")
        for index, (job, _) in enumerate(kept):
            os.replace(job.target / RECORDS, template.sharded_filepath(shard_index=index, num_shards=len(kept)))
        cache.write_json(Path(self.data_dir_root) / "dropped.json", sum(c["dropped"] for c in counts))
        self.info.set_splits(splits.SplitDict([_split_info([c for _, c in kept], template)]))

    def _as_dataset(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("ArrayRecord datasets are read with as_data_source()")


def _split_info(counts: list[dict[str, int]], template: Any) -> splits.SplitInfo:
    return splits.SplitInfo(
        name="train",
        shard_lengths=[c["documents"] for c in counts],
        num_bytes=sum(c["bytes"] for c in counts),
        filename_template=template,
    )
