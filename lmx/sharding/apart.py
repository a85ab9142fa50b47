"""Sums over the rows of a batch: of all of them, or apart, where their spread is wanted too."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lmx.sharding.rules import ways

_apart: contextvars.ContextVar[bool] = contextvars.ContextVar("rows_apart", default=False)


@contextlib.contextmanager
def rows_apart() -> Iterator[None]:
    """Within the block (where a function is traced), :func:`over_rows` keeps rows apart."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def over_rows(function: Callable[..., Any], *trees: Any) -> Any:
    """``function(*trees)``, a tree of sums over rows, of trees of arrays [batch, ...].

    In :func:`rows_apart`, each array of the result has a first axis more, [groups]: what the function gives for each
    row alone or, where the mesh splits the batch, for one row of every shard together, because a smaller batch does not
    divide. The groups come one after the other, so that no more of their logits exist at once than before.
    """
    if not _apart.get():
        return function(*trees)
    return jax.lax.map(lambda group: function(*group), jax.tree.map(_grouped, trees))


def _grouped(array: jax.Array) -> jax.Array:
    """[batch, ...] -> [groups, ways, ...]: no row leaves its device."""
    return jnp.moveaxis(array.reshape(ways("act_batch"), -1, *array.shape[1:]), 1, 0)
