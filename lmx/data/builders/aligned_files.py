"""Text files that are aligned by line as a TFDS dataset of pairs."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmx.data.builders import files
from lmx.data.builders.base import DocumentsBuilder
from lmx.data.builders.span import Span
from lmx.errors import UserError


class AlignedFiles(DocumentsBuilder):
    """One pair a line; ``path`` tells the source's file and line."""

    FEATURES = ("text", "target", "path")

    @classmethod
    def spans(cls, source: Any) -> list[Span]:
        """One span a pair of files."""
        return [Span(path, os.stat(path).st_size) for path, _ in files.aligned(source)]

    @classmethod
    def records(cls, source: Any, span: Span) -> Iterator[dict[str, str] | None]:
        """The pairs of two files; None where one side is blank.

        Raises:
          UserError: one file has more lines than the other, or is not UTF-8.
        """
        target = dict(files.aligned(source))[span.path]
        ours, theirs = _lines(span.path), _lines(target)
        if len(ours) != len(theirs):
            raise UserError(
                f"{span.path} has {len(ours)} lines but {target} has {len(theirs)}: aligned files have as many lines, "
                "line i of the one the source of line i of the other"
            )
        for number, (text, other) in enumerate(zip(ours, theirs, strict=True), start=1):
            both = text.strip() and other.strip()
            yield {"text": text.strip(), "target": other.strip(), "path": f"{span.path}:{number}"} if both else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8 ({error}): convert it or leave it out") from error
