"""Preferences from the running interpreter's standard library: which code belongs to a docstring."""

import json
from collections.abc import Iterator
from typing import Any, ClassVar

from lmx.data.builders.base import Span
from lmx.data.builders.python_stdlib import PythonStdlib


class StdlibPreferences(PythonStdlib):
    """One example a documented definition: the first paragraph of its docstring as a comment, its own code (chosen),
    and the code of the module's next one (rejected)."""

    FEATURES: ClassVar[tuple[str, ...]] = ("text", "example", "split", "path")

    @classmethod
    def records(cls, source: Any, span: Span) -> Iterator[dict[str, str] | None]:
        """The examples of a module; None where the module does not decode."""
        for module in super().records(source, span):
            if module is None:
                yield None
                continue
            found = [(name, code, about) for name, code, about in json.loads(module["docstrings"]) if code.strip()]
            for (name, code, about), (_, other, _) in zip(found, [*found[1:], *found[:1]], strict=True):
                prompt = "# " + " ".join(about.strip().split("\n\n")[0].split()) + "\n"
                if prompt.strip("# \n") and code != other:
                    example = json.dumps({"prompt": prompt, "chosen": code, "rejected": other})
                    yield {"text": prompt, "example": example, "split": "train", "path": f"{module['path']}:{name}"}
