"""Preferences from the running interpreter's standard library: code whose lines stand in their order."""

import json
import random
from collections.abc import Iterator
from typing import Any

from lmx.data.builders.python_stdlib import Definition, Definitions


class StdlibPreferences(Definitions):
    """One example a documented definition: the first paragraph of its docstring as a comment, its code (chosen), and
    the same code with the lines after its first in another order (rejected)."""

    @classmethod
    def made(cls, source: Any, found: list[Definition]) -> Iterator[dict[str, str] | None]:
        """The examples; None for a definition that says nothing, or whose lines have one order only."""
        for one in found:
            prompt, chosen, rejected = f"# {one.summary}\n", one.code, disordered(one.code)
            content = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            complete = one.summary and chosen.strip() and chosen != rejected
            record = {"text": prompt, "example": json.dumps(content), "split": "train", "path": one.path}
            yield record if complete else None


def disordered(code: str) -> str:
    """The code with the lines after its first in an order that its text decides."""
    first, *rest = code.split("\n")
    random.Random(code).shuffle(rest)
    return "\n".join([first, *rest])
