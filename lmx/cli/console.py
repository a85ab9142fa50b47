"""What commands show on a terminal, and as plain lines elsewhere."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Shows what is going on: a spinner on a terminal, lines elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:
        yield status.update if console.is_terminal else console.print


def table_text(table: Any) -> str:
    """A table as text, as wide as it needs where the output is no terminal."""
    from rich.console import Console

    console = Console()
    width = console.width if console.is_terminal else 160
    out = Console(file=io.StringIO(), width=width)
    out.print(table)
    return str(out.file.getvalue()).rstrip()  # type: ignore[attr-defined]
