"""Code and docstrings of the running interpreter's standard library as a TFDS dataset of pairs."""

import json
from collections.abc import Iterator
from typing import Any

from lmx.data.builders.base import Span
from lmx.data.builders.python_stdlib import PythonStdlib


class Docstrings(PythonStdlib):
    """One pair a documented definition: its code without the docstring, and the docstring."""

    FEATURES = ("text", "target", "path")

    @classmethod
    def records(cls, source: Any, span: Span) -> Iterator[dict[str, str] | None]:
        """The pairs of a module; None for one whose docstring is blank, or where the module does not decode."""
        for module in super().records(source, span):
            if module is None:
                yield None
                continue
            for name, code, docstring in json.loads(module["docstrings"]):
                target = " ".join(docstring.strip().split("\n\n")[0].split()) if source.summary else docstring.strip()
                path = f"{module['path']}:{name}"
                yield {"text": code, "target": target, "path": path} if target and code.strip() else None
