"""Parts of a parameter tree, chosen by the parameters' names.

A name is the path of a leaf, as in ``stack/segment_0/block_0/mlp/up/kernel``; a pattern is one of ``fnmatch``, whose
``*`` also stands for slashes.
"""

import fnmatch
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

from lmx.config import nearest
from lmx.errors import UserError
from lmx.nn.module import Params


def name_of(path: Any) -> str:
    """The name at a path of ``jax.tree_util``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_axes(value: Any) -> bool:
    """Whether this is a leaf of a tree of logical axes."""
    return isinstance(value, tuple)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits any of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def names(tree: Any) -> list[str]:
    """The names of a tree's leaves, or of a tree of logical axes."""
    return [name_of(path) for path, _ in jax.tree.leaves_with_path(tree, is_leaf=is_axes)]


def pick(tree: Any, wanted: Callable[[str], bool]) -> Params:
    """The leaves whose name is wanted, as nested dicts."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_axes)
    return unflatten_dict({tuple(name_of(p).split("/")): leaf for p, leaf in leaves if wanted(name_of(p))})


def put(tree: Any, part: Params) -> Any:
    """The tree with the leaves of ``part`` (from :func:`pick`) in their places."""
    own = {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(part, is_leaf=is_axes)}
    return jax.tree.map_with_path(lambda path, leaf: own.get(name_of(path), leaf), tree, is_leaf=is_axes)


def check_patterns(field: str, patterns: Iterable[str], known: Collection[str]) -> None:
    """Raises UserError for the first pattern that fits none of the ``known`` names, with those most like it."""
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in known):
            close = ", ".join(nearest(pattern, known).split(", ")[:3])
            raise UserError(
                f"{field} has the pattern {pattern!r}, which fits no parameter; some names are {close} (lmx model "
                "RECIPE shows all)"
            )
