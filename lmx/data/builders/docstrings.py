"""Code and docstrings of the running interpreter's standard library as a TFDS dataset of pairs."""

from collections.abc import Iterator
from typing import Any

from lmx.data.builders.python_stdlib import Definition, Definitions


class Docstrings(Definitions):
    """One pair a documented definition: its code without the docstring, and the docstring."""

    FEATURES = ("text", "target", "path")

    @classmethod
    def made(cls, source: Any, found: list[Definition]) -> Iterator[dict[str, str] | None]:
        """The pairs; None for one whose docstring is blank."""
        for one in found:
            target = one.summary if source.summary else one.docstring.strip()
            yield {"text": one.code, "target": target, "path": one.path} if target and one.code.strip() else None
