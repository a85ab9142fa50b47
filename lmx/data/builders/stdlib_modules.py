"""Snippets of the running interpreter's standard library, labelled by module, as a TFDS dataset."""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from lmx.data.builders import files
from lmx.data.builders.python_stdlib import PythonStdlib, module_path, module_text
from lmx.data.builders.span import Span


class StdlibModules(PythonStdlib):
    """Whole lines of a module, with the name of the top-level module that they come from."""

    FEATURES: ClassVar[tuple[str, ...]] = ("text", "example", "split", "path")

    @classmethod
    def spans(cls, source: Any) -> list[Span]:
        """The files of the modules with the most text, sorted by path."""
        sizes = _sizes()
        largest = {name for name, _ in sizes.most_common(source.modules)}
        return [span for span in super().spans(source) if top_level(span.path) in largest]

    @classmethod
    def records(cls, source: Any, span: Span) -> Iterator[dict[str, str] | None]:
        """The chosen snippets of a file."""
        name = top_level(span.path)
        share = min(1.0, source.per_module * source.snippet_bytes / _sizes()[name])
        for line, text in snippets(module_text(span.path) or "", source.snippet_bytes):
            digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"choose").digest()
            if int.from_bytes(digest, "little") < share * 2**64:
                example = json.dumps({"text": text, "labels": [name]})
                path = f"{module_path(span.path)}:{line}"
                yield {"text": text, "example": example, "split": "train", "path": path}


def top_level(path: str) -> str:
    """The module of a file of the library: ``asyncio`` of ``asyncio/events.py``, ``ast`` of ``ast.py``."""
    return Path(path).relative_to(files.stdlib_root()).parts[0].removesuffix(".py")


@functools.cache
def _sizes() -> Counter[str]:
    """Bytes of each top-level module."""
    sizes: Counter[str] = Counter()
    for path in files.stdlib_files():
        sizes[top_level(path)] += os.stat(path).st_size
    return sizes


def snippets(text: str, size: int) -> Iterator[tuple[int, str]]:
    """(number of the first line, text): whole lines up to ``size`` bytes together, the rest of a file left out."""
    lines: list[str] = []
    first = 1
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if lines and len("".join([*lines, line]).encode()) > size:
            if any(held.strip() for held in lines):
                yield first, "".join(lines)
            lines, first = [], number
        lines.append(line)
