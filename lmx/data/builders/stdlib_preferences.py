"""Preferences from the running interpreter's standard library: which code belongs to a docstring."""

import json
from collections.abc import Iterator
from typing import Any

from lmx.data.builders.python_stdlib import Definition, Definitions


class StdlibPreferences(Definitions):
    """One example a documented definition: the first paragraph of its docstring as a comment, its own code (chosen),
    and the code of the module's next one (rejected)."""

    @classmethod
    def made(cls, source: Any, found: list[Definition]) -> Iterator[dict[str, str] | None]:
        """The examples; None for a definition that says nothing, or is the module's only one."""
        for one, other in zip(found, [*found[1:], *found[:1]], strict=True):
            prompt, chosen, rejected = f"# {one.summary}\n", one.code, other.code
            content = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            complete = one.summary and chosen.strip() and rejected.strip() and chosen != rejected
            record = {"text": prompt, "example": json.dumps(content), "split": "train", "path": one.path}
            yield record if complete else None
