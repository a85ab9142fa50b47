"""What the pages share: one self-contained document, and its parts."""

import json
from html import escape
from typing import Any

from lmx.report.style import CSS


def document(title: str, body: str, *, style: str = "") -> str:
    """A whole page; ``body`` and ``style`` go in as they are."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{style}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{body}</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A part of a page with a heading."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def embedded_json(name: str, data: Any) -> str:
    """Data for a page's script, under the id ``name``; nothing in it can end the element."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'
