"""Files of this machine as a TFDS dataset: plain text, or a column of JSON lines, JSON, CSV, Parquet."""

import codecs
from collections.abc import Iterator
from typing import IO, Any

from lmx.data import config
from lmx.data.builders import files, tables
from lmx.data.builders.base import DocumentsBuilder
from lmx.data.builders.span import Span
from lmx.errors import UserError

PARAGRAPHS_ABOVE = 1 << 20  # bytes; smaller text files are one document each
GROUP_BYTES = 8 << 10
LINE_LIMIT = 4 * GROUP_BYTES  # a longer line is cut at a space


class LocalFiles(DocumentsBuilder):
    """Documents from text files, and from files with named columns; ``path`` tells the file and the place in it."""

    @classmethod
    def spans(cls, source: config.LocalFiles) -> list[Span]:
        """The matched files in sorted order; large JSON lines and Parquet files in several stretches."""
        return [span for path in files.matched_files(source) for span in tables.file_spans(path)]

    @classmethod
    def records(cls, source: config.LocalFiles, span: Span) -> Iterator[dict[str, str] | None]:
        """The documents of a stretch; None for a blank one."""
        for place, text in _reader(span.path)(source, span):
            path = f"{span.path}{place}"
            yield {"text": text, "path": path} if text.strip() else None


def _reader(path: str) -> Any:
    return _column if tables.has_columns(path) else _text


def _column(source: config.LocalFiles, span: Span) -> Iterator[tuple[str, str]]:
    column = source.text_column
    if span.path.endswith(".parquet"):
        _check_parquet(span.path, column)
    for place, row in tables.rows(span, [column]):
        if column not in row:
            known = ", ".join(row)
            raise UserError(f"{span.path}{place} has no column {column!r} (it has {known}): set text_column")
        if not isinstance(row[column], str | None):
            raise UserError(f"{span.path}{place}: column {column!r} is {row[column]!r}, expected text: set text_column")
        yield place, row[column] or ""


def _check_parquet(path: str, column: str) -> None:
    from pyarrow.types import is_dictionary

    schema = tables.parquet_file(path).schema_arrow
    if column not in schema.names:
        raise UserError(f"{path} has no column {column!r} (it has {', '.join(schema.names)}): set text_column")
    stored = schema.field(column).type
    kind = stored.value_type if is_dictionary(stored) else stored  # pandas writes categories so
    if str(kind) not in ("string", "large_string", "string_view"):
        raise UserError(f"{path}: column {column!r} is {kind}, expected text: set text_column")


def _text(source: config.LocalFiles, span: Span) -> Iterator[tuple[str, str]]:
    with tables.open_bytes(span.path) as file:
        whole = source.split == "file" or (source.split == "auto" and not _is_large(file))
        if whole:
            yield "", tables.decode(file.read().removeprefix(codecs.BOM_UTF8), span.path)
            return
        for offset, data in _paragraph_groups(file):
            yield f"@{offset}", tables.decode(data.removeprefix(codecs.BOM_UTF8), span.path, offset)


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
