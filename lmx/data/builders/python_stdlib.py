"""The standard library of the running interpreter as a TFDS dataset."""

import abc
import ast
import json
import os
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lmx.data.builders import files
from lmx.data.builders.base import DocumentsBuilder
from lmx.data.builders.span import Span


class Definition(NamedTuple):
    """A documented function or class: the path of its module, its name, its code without the docstring, and that."""

    module: str
    name: str
    code: str
    docstring: str

    @property
    def path(self) -> str:
        """Where it is from."""
        return f"{self.module}:{self.name}"

    @property
    def summary(self) -> str:
        """The docstring's first paragraph, on one line."""
        return " ".join(self.docstring.strip().split("\n\n")[0].split())


class PythonStdlib(DocumentsBuilder):
    """Modules of the Python standard library, with (name, code, docstring) of every documented definition."""

    FEATURES: ClassVar[tuple[str, ...]] = ("text", "path", "docstrings")

    @classmethod
    def spans(cls, source: Any) -> list[Span]:
        """One span a module, sorted by path."""
        return [Span(path, os.stat(path).st_size) for path in files.stdlib_files()]

    @classmethod
    def records(cls, source: Any, span: Span) -> Iterator[dict[str, str] | None]:
        """One record; None where the module's own encoding does not decode it (some are test data)."""
        text = module_text(span.path)
        if text is None:
            yield None
            return
        yield {"text": text, "path": module_path(span.path), "docstrings": json.dumps(docstrings(text))}


def module_text(path: str) -> str | None:
    """The text of a module; None if its own encoding does not decode it."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def module_path(path: str) -> str:
    """The path of a module in the library."""
    return Path(path).relative_to(files.stdlib_root()).as_posix()


class Definitions(PythonStdlib):
    """Base class of datasets that are made of the documented definitions."""

    FEATURES: ClassVar[tuple[str, ...]] = ("text", "example", "split", "path")

    @classmethod
    def records(cls, source: Any, span: Span) -> Iterator[dict[str, str] | None]:
        """What is made of a module's definitions; None where the module does not decode."""
        for module in super().records(source, span):
            if module is None:
                yield None
            else:
                found = json.loads(module["docstrings"])
                yield from cls.made(source, [Definition(module["path"], *each) for each in found])

    @classmethod
    @abc.abstractmethod
    def made(cls, source: Any, found: list[Definition]) -> Iterator[dict[str, str] | None]:
        """The records of a module's definitions; None for one that is left out."""


def docstrings(text: str) -> list[tuple[str, str, str]]:
    """(name, code without the docstring, docstring) of each documented function and class of a module."""
    if '"""' not in text and "'''" not in text:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarnings about the corpus are not the user's
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # the library holds files that are wrong on purpose; their text is still a document
    lines = text.splitlines()
    return [pair for node in _statements(tree) for pair in _documented(node, lines)]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements under ``node``, at any depth; ``ast.walk`` would go into every expression."""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            yield child
            yield from _statements(child)


def _documented(node: ast.AST, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    docstring = ast.get_docstring(node)
    first = node.body[0]
    if docstring and first.end_lineno and node.end_lineno and first.lineno > node.lineno:
        code = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        yield node.name, "\n".join(code), docstring
