"""Conversations about the running interpreter's standard library as a TFDS dataset."""

import json
from collections.abc import Iterator
from typing import Any, ClassVar

from lmx.data.builders.base import Span
from lmx.data.builders.python_stdlib import PythonStdlib


class StdlibChats(PythonStdlib):
    """One conversation a documented definition: what it does, and where it is from."""

    FEATURES: ClassVar[tuple[str, ...]] = ("text", "example", "split", "path")

    @classmethod
    def records(cls, source: Any, span: Span) -> Iterator[dict[str, str] | None]:
        """The conversations of a module; None for one whose docstring is blank, or where the module does not decode."""
        for module in super().records(source, span):
            if module is None:
                yield None
                continue
            dotted = module["path"].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for name, code, docstring in json.loads(module["docstrings"]):
                summary = " ".join(docstring.strip().split("\n\n")[0].split())
                messages = [
                    {"role": "user", "content": f"What does `{name}` do?\n\n{code}"},
                    {"role": "assistant", "content": summary},
                    {"role": "user", "content": "Which module is it from?"},
                    {"role": "assistant", "content": f"It is from `{dotted}`."},
                ]
                example = json.dumps({"messages": messages})
                record = {"text": code, "example": example, "split": "train", "path": f"{module['path']}:{name}"}
                yield record if summary and code.strip() else None
