"""HTML pages in two languages that are aligned by the ids of their paragraphs as a TFDS dataset of pairs."""

import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

from lmx.data.builders import files
from lmx.data.builders.base import DocumentsBuilder
from lmx.data.builders.span import Span
from lmx.errors import UserError

PARAGRAPH = re.compile(r"(par|hd)_id")
"""How the ids of paragraphs and headings begin in LibreOffice's help."""


class AlignedPages(DocumentsBuilder):
    """One pair for every paragraph that both versions of a page have; ``path`` tells the page and the paragraph."""

    FEATURES: ClassVar[tuple[str, ...]] = ("text", "target", "path", "page")

    @classmethod
    def spans(cls, source: Any) -> list[Span]:
        """One span a page."""
        return [Span(path, os.stat(path).st_size) for path, _ in files.aligned_pages(source)]

    @classmethod
    def records(cls, source: Any, span: Span) -> Iterator[dict[str, str] | None]:
        """The pairs of a page; None for a paragraph that only one version has, or that both have alike."""
        page = Path(span.path).relative_to(Path(source.directory).expanduser().absolute()).as_posix()
        ours = paragraphs(span.path)
        theirs = paragraphs(str(Path(source.target_directory).expanduser().absolute() / page))
        for name in ours | theirs:
            text, target = ours.get(name, ""), theirs.get(name, "")
            record = {"text": text, "target": target, "path": f"{page}#{name}", "page": page}
            yield record if text and target and text != target else None


def paragraphs(path: str) -> dict[str, str]:
    """The texts of a page's paragraphs and headings by their ids, in order; blanks count as one.

    Raises:
      UserError: the page is not UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8 ({error}): convert it or leave it out") from error
    parser = _Paragraphs()
    parser.feed(text)
    parser.close()
    return parser.found


class _Paragraphs(HTMLParser):
    """Of what is written differently for each system (spans that are hidden until a script chooses), the default."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._name, self._tag, self._depth, self._hidden = "", "", 0, 0
        self._pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begins a paragraph, or goes deeper in one."""
        name = dict(attrs).get("id") or ""
        if not self._name and PARAGRAPH.match(name):
            self._name, self._tag, self._depth, self._hidden, self._pieces = name, tag, 1, 0, []
            return
        self._depth += tag == self._tag
        if tag in ("br", "img"):
            self._pieces.append(" ")
        hides = "hidden" in dict(attrs) and not name.startswith("default")
        self._hidden += tag == "span" and bool(self._hidden or hides)

    def handle_endtag(self, tag: str) -> None:
        """Ends a paragraph, or goes up in one."""
        self._depth -= tag == self._tag
        self._hidden -= tag == "span" and self._hidden > 0
        text = " ".join("".join(self._pieces).split())
        if self._name and not self._depth:
            self.found |= {self._name: text} if text else {}
            self._name = self._tag = ""

    def handle_data(self, data: str) -> None:
        """Keeps what is shown."""
        if self._name and not self._hidden:
            self._pieces.append(data)
