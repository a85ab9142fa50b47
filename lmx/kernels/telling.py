"""What goes on inside of a model, for those who look: code tells it by name, and computes it only if someone listens.

Listen around a trace of unstacked layers: what is told inside of a ``lax.scan`` does not outlive it.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

Heard = list[tuple[str, jax.Array]]
"""What was told, in order: its name and its value."""
_heard: contextvars.ContextVar[tuple[Heard, tuple[str, ...]] | None] = contextvars.ContextVar("heard", default=None)


@contextlib.contextmanager
def listening(*names: str) -> Iterator[Heard]:
    """Within the block, what is told by one of these names, or by any if there are none, is added to the list that this
    gives."""
    heard: Heard = []
    token = _heard.set((heard, names))
    try:
        yield heard
    finally:
        _heard.reset(token)


def tell(name: str, of: Callable[[], Any]) -> None:
    """Tells what ``of`` computes, if someone listens."""
    listener = _heard.get()
    if listener is None:
        return
    heard, names = listener
    if not names or name in names:
        heard.append((name, of()))
