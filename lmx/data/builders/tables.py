"""Rows with named columns, of JSON, JSON lines, CSV and Parquet files and of prepared TFDS datasets."""

import codecs
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from lmx.data import parts
from lmx.data.builders.span import Span
from lmx.errors import UserError

Row = dict[str, Any]
SEPARATORS = {".csv": ",", ".tsv": "\t"}
csv.field_size_limit(2**31 - 1)  # by default a column has 131,072 characters at the most


def file_spans(path: str, split: str = "") -> list[Span]:
    """The stretches of a file that can be read apart; ``split`` is a TFDS dataset's."""
    size = os.stat(path).st_size
    if os.path.isdir(path):
        builder = _tfds(path)
        if split not in builder.info.splits:
            raise UserError(f"{path} has no split {split!r} (it has {', '.join(builder.info.splits)}): set split")
        return [Span(path, builder.info.splits[split].num_bytes, split=split)]
    if path.endswith((".jsonl", ".ndjson")):
        cuts = [*range(0, size, parts.PART_BYTES), size]
        return [Span(path, end - start, start, end) for start, end in pairwise(cuts)]
    if path.endswith(".parquet"):
        groups = parquet_file(path).num_row_groups
        return [Span(path, size // groups, i, i + 1) for i in range(groups)]
    return [Span(path, size, 0, size)]


def rows(span: Span, columns: list[str] | None = None) -> Iterator[tuple[str, Row]]:
    """(place in the file, row) of a stretch, in order; of ``columns`` alone where the format has them apart.

    Raises:
      UserError: a file that is not what its name says, or of another kind.
    """
    if os.path.isdir(span.path):
        return _tfds_rows(span)
    name = span.path.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return json_lines(span)
    if span.path.endswith(".parquet"):
        return _parquet_rows(span, columns)
    if os.path.splitext(name)[1] in SEPARATORS:
        return _csv_rows(span, SEPARATORS[os.path.splitext(name)[1]])
    if name.endswith(".json"):
        return _json_rows(span)
    raise UserError(f"{span.path} has no named columns: give .jsonl, .csv, .tsv, .json or .parquet files")


def has_columns(path: str) -> bool:
    """Whether a file's name says that it has rows with named columns."""
    return os.path.splitext(path.removesuffix(".gz"))[1] in (".jsonl", ".ndjson", ".json", ".parquet", *SEPARATORS)


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """A file's content, unzipped. Raises UserError, while it is read, if its end is missing or it is damaged."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            yield file  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): make or copy it again") from error


def decode(data: bytes, path: str, offset: int = 0) -> str:
    """The text of UTF-8. Raises UserError, with the place of the byte, if it is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not valid UTF-8 (byte {offset + error.start} is "
            f"0x{data[error.start]:02x}): convert it to "
            "UTF-8, for example with iconv, or leave it out of the files"
        ) from error


def json_lines(span: Span) -> Iterator[tuple[str, Row]]:
    """The rows of a stretch; places are byte offsets."""
    with open_bytes(span.path) as file:
        if span.start:  # the line that runs over the start belongs to the stretch before
            file.seek(span.start - 1)
            file.readline()
        while (span.path.endswith(".gz") or file.tell() < span.end) and (line := file.readline()):
            if line.strip():
                place = f"@{file.tell() - len(line)}"
                yield place, _json(line, f"{span.path}{place}")


def _json(line: bytes, place: str) -> Row:
    try:
        row = json.loads(decode(line.removeprefix(codecs.BOM_UTF8), place))
    except json.JSONDecodeError as error:
        raise UserError(f"{place} (a byte offset) is not a line of JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{place} is a {type(row).__name__} without columns, expected an object on each line")
    return row


def _json_rows(span: Span) -> Iterator[tuple[str, Row]]:
    with open_bytes(span.path) as file:
        text = decode(file.read().removeprefix(codecs.BOM_UTF8), span.path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{span.path} is not JSON: {error}; if it has an object on each line, name it .jsonl"
        ) from error
    found = _squad(content["data"]) if isinstance(content, dict) and "data" in content else content
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UserError(
            f'{span.path} is neither a list of objects nor SQuAD\'s {{"data": [...]}}: leave it out of the files'
        )
    for index, row in enumerate(found):
        yield f"#{index}", row


def _squad(articles: list[Any]) -> list[Row]:
    """The questions of the published files (Rajpurkar et al. 2016, 2018), each with its context."""
    return [
        {"context": paragraph["context"], "question": asked["question"], "answers": asked["answers"]}
        for article in articles
        for paragraph in article.get("paragraphs", ())
        for asked in paragraph["qas"]
    ] or articles


def _csv_rows(span: Span, separator: str) -> Iterator[tuple[str, Row]]:
    with open_bytes(span.path) as file:
        text = decode(file.read().removeprefix(codecs.BOM_UTF8), span.path)
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in lines:
            if None in row or None in row.values():
                raise UserError(
                    f"{span.path}:{lines.line_num} has another number of columns than the first line, which names "
                    f"{', '.join(lines.fieldnames or ())}: quote what holds a {separator!r}"
                )
            yield f":{lines.line_num}", row
    except csv.Error as error:
        raise UserError(
            f"{span.path}:{lines.line_num} is not a line of {separator!r}-separated columns: {error}"
        ) from error


def parquet_file(path: str) -> Any:
    """An open file. Raises UserError if it is not Parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{Path(path)} is not a Parquet file: {error}") from error


def _parquet_rows(span: Span, columns: list[str] | None) -> Iterator[tuple[str, Row]]:
    file = parquet_file(span.path)
    there = None if columns is None else [c for c in columns if c in file.schema_arrow.names]
    first = sum(file.metadata.row_group(i).num_rows for i in range(span.start))
    for index, row in enumerate(_row_group(file, span, there or None)):
        yield f"#{first + index}", row


def _row_group(file: Any, span: Span, columns: list[str] | None) -> list[Row]:
    """The rows of a group. Raises UserError if its pages are damaged, or its text is no UTF-8."""
    import pyarrow

    where = f"{span.path}, row group {span.start},"
    try:
        return file.read_row_group(span.start, columns=columns).to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} has text that is not valid UTF-8 ({error}): write the file again") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where} cannot be read ({error}): make or copy the file again") from error


def _tfds(path: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(path)


def _tfds_rows(span: Span) -> Iterator[tuple[str, Row]]:
    builder = _tfds(span.path)
    try:
        records = builder.as_data_source(span.split)
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"{span.path} cannot be read without TensorFlow ({error}): prepare it with "
            'download_and_prepare(file_format="array_record")'
        ) from error
    features = builder.info.features
    for index in range(len(records)):
        yield f"[{index}]", {name: _plain(value, features[name]) for name, value in records[index].items()}


def _plain(value: Any, feature: Any) -> Any:
    """What TFDS decodes, as JSON has it: text, numbers, lists; a class by its name."""
    inner = getattr(feature, "feature", None)
    if isinstance(value, dict):
        return {k: _plain(v, inner[k] if inner is not None else feature[k]) for k, v in value.items()}
    if isinstance(value, bytes):
        return value.decode()
    if getattr(value, "ndim", 0) or isinstance(value, list):
        return [_plain(v, inner) for v in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bytes):
        return value.decode()
    names = getattr(feature, "int2str", None)
    return names(value) if names is not None and getattr(feature, "names", None) and value >= 0 else value
