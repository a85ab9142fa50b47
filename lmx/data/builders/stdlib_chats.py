"""Conversations about the running interpreter's standard library as a TFDS dataset."""

import json
from collections.abc import Iterator
from typing import Any

from lmx.data.builders.python_stdlib import Definition, Definitions


class StdlibChats(Definitions):
    """One conversation a documented definition: what it does, and where it is from."""

    @classmethod
    def made(cls, source: Any, found: list[Definition]) -> Iterator[dict[str, str] | None]:
        """The conversations; None for one whose docstring is blank."""
        for one in found:
            dotted = one.module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            messages = [
                {"role": "user", "content": f"What does `{one.name}` do?\n\n{one.code}"},
                {"role": "assistant", "content": one.summary},
                {"role": "user", "content": "Which module is it from?"},
                {"role": "assistant", "content": f"It is from `{dotted}`."},
            ]
            example = json.dumps({"messages": messages})
            record = {"text": one.code, "example": example, "split": "train", "path": one.path}
            yield record if one.summary and one.code.strip() else None
