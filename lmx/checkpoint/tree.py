"""States as a checkpoint stores them: nested dicts with string keys, whatever containers the program uses.

The names of the leaves are all that a checkpoint shares with the program that reads it. They are the same for
a tuple, a list, a named tuple (by field) and a dict with integer keys.
"""

from collections.abc import Mapping
from typing import Any

import jax

from lmx.errors import UserError

Name = tuple[str, ...]


def named_leaves(state: Any) -> dict[Name, Any]:
    """The leaves of a pytree by the names on the way to them, in the order of the pytree."""
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in paths}


def nest(leaves: Mapping[Name, Any]) -> Any:
    """The named leaves as nested dicts; a single leaf without a name as itself."""
    if () in leaves:
        return leaves[()]
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        node = tree
        for key in name[:-1]:
            node = node.setdefault(key, {})
        node[name[-1]] = leaf
    return tree


def storable(state: Any) -> Any:
    """The state as nested dicts of arrays, ready to be saved.

    Raises:
      TypeError: a leaf is not a ``jax.Array`` of numbers.
    """
    leaves = named_leaves(state)
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"the state's {_show(name)} is a {type(leaf).__name__}, expected a jax.Array")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"the state's {_show(name)} is a typed key; save its jax.random.key_data")
    return nest(leaves)


def check_fits(stored: Mapping[Name, Any], wanted: Mapping[Name, Any], what: str) -> None:
    """Compares the shapes and dtypes that a checkpoint holds with those that a program wants.

    Args:
      stored: leaves with ``shape`` and ``dtype`` by name.
      wanted: the same of the program.
      what: the checkpoint, as the message should name it.

    Raises:
      UserError: they differ; it names the first leaves that do.
    """
    wrong = [
        f"{_show(n)} is {_kind(stored[n])}, expected {_kind(leaf)}"
        for n, leaf in wanted.items()
        if n in stored and _kind(stored[n]) != _kind(leaf)
    ]
    missing = [f"{_show(n)} is missing" for n in wanted if n not in stored]
    unexpected = [f"{_show(n)} is unexpected" for n in stored if n not in wanted]
    found = missing[:2] + unexpected[:2] + wrong[:2]
    more = len(missing) + len(unexpected) + len(wrong) - len(found)
    if found:
        rest = f" (and {more} more)" if more else ""
        advice = "use the configuration it was saved with"
        raise UserError(f"{what} does not fit this model: {'; '.join(found)}{rest}; {advice}")


def _show(name: Name) -> str:
    return "/".join(name)


def _kind(leaf: Any) -> str:
    return f"{jax.numpy.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
