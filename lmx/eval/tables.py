"""Rows of tables in local files: JSON lines, JSON, CSV, Parquet, and text by line."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmx.data.builders.files import matched_files
from lmx.data.builders.tables import decode, file_spans, open_bytes, rows
from lmx.data.config import LocalFiles
from lmx.errors import UserError

Example = dict[str, Any]
"""One row: its values by column."""
LINE = "text"
"""The column that a line of a text file is."""


def read_rows(patterns: Sequence[str], flatten: Callable[[Any], Iterator[Example]]) -> list[Example]:
    """The rows of all files that the patterns name, in the order of the patterns, then of the paths.

    Args:
      patterns: paths or globs of .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .txt files; all but Parquet may be
        gzipped.
      flatten: turns the content of a .json file into rows.

    Raises:
      UserError: a pattern that matches nothing, another kind of file, or one that is not what its name says.
    """
    paths = dict.fromkeys(path for p in patterns for path in matched_files(LocalFiles(files=(p,))))
    return [row for path in paths for row in _file_rows(path, flatten)]


def read_lines(patterns: Sequence[str]) -> list[str]:
    """The lines of text files, as :func:`read_rows` finds them."""
    return [str(row[LINE]) for row in read_rows(patterns, listed)]


def listed(content: Any) -> Iterator[Example]:
    """The rows of a JSON file that is a list of objects, or holds one under ``data``."""
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError("its JSON is neither a list of objects nor has one under 'data'")
    yield from rows


def column(row: Example, name: str) -> Any:
    """A value of a row.

    Raises:
      UserError: there is no such column.
    """
    if name not in row:
        raise UserError(f"there is no column {name!r}; the columns are {', '.join(row) or 'none'}")
    return row[name]


def _file_rows(path: str, flatten: Callable[[Any], Iterator[Example]]) -> Iterator[Example]:
    name = path.removesuffix(".gz")
    if name.endswith(".txt"):
        yield from ({LINE: line} for line in _lines(_text(path)))
    elif name.endswith(".json"):
        try:
            yield from flatten(json.loads(_text(path)))
        except (UserError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read as examples: {error}") from error
    else:
        for span in file_spans(path):
            yield from (row for _, row in rows(span))


def _lines(text: str) -> list[str]:
    """The lines, which newlines alone end: files that are aligned by line may hold other breaks within one."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _text(path: str) -> str:
    with open_bytes(path) as file:
        return decode(file.read(), path).removeprefix("\ufeff")
