"""Files of this machine as a TFDS dataset: plain text, JSON lines, Parquet."""

import codecs
import gzip
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from lmx.data import config, parts
from lmx.data.builders import files
from lmx.data.builders.base import DocumentsBuilder, Span
from lmx.errors import UserError

PARAGRAPHS_ABOVE = 1 << 20  # bytes; smaller text files are one document each
GROUP_BYTES = 8 << 10
LINE_LIMIT = 4 * GROUP_BYTES  # a longer line is cut at a space


class LocalFiles(DocumentsBuilder):
    """Documents from text, JSON lines and Parquet files; ``path`` tells the file and the place in it."""

    @classmethod
    def spans(cls, source: config.LocalFiles) -> list[Span]:
        """The matched files in sorted order; large JSON lines and Parquet files in several stretches."""
        return [span for path in files.matched_files(source) for span in _file_spans(path)]

    @classmethod
    def records(cls, source: config.LocalFiles, span: Span) -> Iterator[dict[str, str] | None]:
        """The documents of a stretch; None for a blank one."""
        for place, text in _reader(span.path)(source, span):
            path = f"{span.path}{place}"
            yield {"text": text, "path": path} if text.strip() else None


def _reader(path: str) -> Any:
    name = path.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return _json_lines
    return _parquet if path.endswith(".parquet") else _text


def _file_spans(path: str) -> list[Span]:
    size = os.stat(path).st_size
    if path.endswith((".jsonl", ".ndjson")):
        cuts = [*range(0, size, parts.PART_BYTES), size]
        return [Span(path, end - start, start, end) for start, end in pairwise(cuts)]
    if path.endswith(".parquet"):
        groups = _parquet_file(path).num_row_groups
        return [Span(path, size // groups, i, i + 1) for i in range(groups)]
    return [Span(path, size, 0, size)]


def _open(path: str) -> IO[bytes]:
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _decode(data: bytes, path: str, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not valid UTF-8 (byte {offset + error.start} is "
            f"0x{data[error.start]:02x}): convert it to "
            "UTF-8, for example with iconv, or leave it out of the files"
        ) from error


def _text(source: config.LocalFiles, span: Span) -> Iterator[tuple[str, str]]:
    try:
        with _open(span.path) as file:
            whole = source.split == "file" or (source.split == "auto" and not _is_large(file))
            if whole:
                yield "", _decode(file.read().removeprefix(codecs.BOM_UTF8), span.path)
                return
            for offset, data in _paragraph_groups(file):
                yield f"@{offset}", _decode(data.removeprefix(codecs.BOM_UTF8), span.path, offset)
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{span.path} is not a whole gzip file ({error}): make or copy it again") from error


def _is_large(file: IO[bytes]) -> bool:
    large = len(file.read(PARAGRAPHS_ABOVE + 1)) > PARAGRAPHS_ABOVE
    file.seek(0)
    return large


def _paragraph_groups(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(offset, text) of groups of lines that end at a blank line after 8 kB, or at any line after 32 kB."""
    offset, lines, size = 0, list[bytes](), 0
    for line in _limited_lines(file):
        lines.append(line)
        size += len(line)
        if size >= (GROUP_BYTES if not line.strip() else LINE_LIMIT):
            yield offset, b"".join(lines)
            offset, lines, size = offset + size, [], 0
    if lines:
        yield offset, b"".join(lines)


def _limited_lines(file: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while line := rest + file.readline(LINE_LIMIT - len(rest)):
        rest = b""
        if len(line) >= LINE_LIMIT and not line.endswith(b"\n"):
            cut = line.rfind(b" ") + 1 or _character_end(line)
            line, rest = line[:cut], line[cut:]
        yield line


def _character_end(line: bytes) -> int:
    """Where the last whole UTF-8 character of a cut line ends."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(line)
    return len(line) - len(decoder.getstate()[0])


def _json_lines(source: config.LocalFiles, span: Span) -> Iterator[tuple[str, str]]:
    with _open(span.path) as file:
        if span.start:  # the line that runs over the start belongs to the stretch before
            file.seek(span.start - 1)
            file.readline()
        while (span.path.endswith(".gz") or file.tell() < span.end) and (line := file.readline()):
            if line.strip():
                offset = file.tell() - len(line)
                yield f"@{offset}", _json_text(line, source.text_column, f"{span.path}@{offset}")


def _json_text(line: bytes, column: str, place: str) -> str:
    try:
        row = json.loads(_decode(line, place))
    except json.JSONDecodeError as error:
        raise UserError(f"{place} (a byte offset) is not a line of JSON: {error}") from error
    if not isinstance(row, dict) or column not in row:
        known = ", ".join(row) if isinstance(row, dict) else f"no columns, it is a {type(row).__name__}"
        raise UserError(f"{place} has no column {column!r} (it has {known}): set text_column")
    if not isinstance(row[column], str | None):
        raise UserError(f"{place}: column {column!r} is {row[column]!r}, expected text: set text_column")
    return row[column] or ""


def _parquet_file(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{Path(path)} is not a Parquet file: {error}") from error


def _parquet(source: config.LocalFiles, span: Span) -> Iterator[tuple[str, str]]:
    file, column = _parquet_file(span.path), source.text_column
    if column not in file.schema_arrow.names:
        known = ", ".join(file.schema_arrow.names)
        raise UserError(f"{span.path} has no column {column!r} (it has {known}): set text_column")
    values = file.read_row_group(span.start, columns=[column]).column(column)
    if str(values.type) not in ("string", "large_string", "string_view"):
        raise UserError(f"{span.path}: column {column!r} is {values.type}, expected text: set text_column")
    row = sum(file.metadata.row_group(i).num_rows for i in range(span.start))
    for offset, value in enumerate(values):
        yield f"#{row + offset}", value.as_py() or ""
