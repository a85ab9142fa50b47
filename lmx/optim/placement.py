"""Where an optimizer's state lies: as the parameters that it belongs to."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lmx.nn.module import Params
from lmx.optim.names import is_axes, name_of
from lmx.sharding.rules import LogicalAxes

Name = tuple[str, ...]


def owners(state: Any, params: Any) -> Iterator[tuple[Name, Name | None, Any]]:
    """For each leaf of an optimizer's state its own name, the name of the parameter that it belongs to (None where
    there is none, as of a count of steps), and the leaf.

    A leaf belongs to the parameter with whose name its own ends.
    """
    known = {tuple(name_of(path).split("/")) for path, _ in jax.tree.leaves_with_path(params)}
    for path, leaf in jax.tree.leaves_with_path(state):
        name = tuple(name_of(path).split("/"))
        owner = next((name[i:] for i in range(len(name)) if name[i:] in known), None)
        yield name, owner, leaf


def placed(state: Any, params: Any, axes: Params, place: Callable[[LogicalAxes], Any]) -> Any:
    """What ``place`` gives for the logical axes of each leaf of an optimizer's state, as a tree parallel to it.

    Moments have the axes of their parameters. Adafactor's factored moments are means over one of a parameter's axes and
    have the others: ``v_row`` lacks the longest, ``v_col`` the second longest. What belongs to no parameter, or has
    another shape, has no logical axes.

    Args:
      state: with the shapes of the state's leaves.
      params: with the shapes of the parameters that are trained.
      axes: their logical axes.
      place: as ``Sharding.named``.
    """
    shapes = {tuple(name_of(path).split("/")): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    by_name = {tuple(name_of(p).split("/")): own for p, own in jax.tree.leaves_with_path(axes, is_leaf=is_axes)}
    found = []
    for name, owner, leaf in owners(state, params):
        own = None if owner is None else _axes(name, leaf.shape, shapes[owner], by_name[owner])
        found.append(place((None,) * len(leaf.shape) if own is None else own))
    return jax.tree.unflatten(jax.tree.structure(state), found)


def _axes(name: Name, shape: tuple[int, ...], whole: tuple[int, ...], axes: LogicalAxes) -> LogicalAxes | None:
    if shape == whole:
        return axes
    mean_over = {"v_row": -1, "v_col": -2}
    for field, rank in mean_over.items():
        if field in name and len(shape) == len(whole) - 1:
            gone = int(np.argsort(whole)[rank])  # Optax's own choice, with its way of breaking ties
            if shape == whole[:gone] + whole[gone + 1 :]:
                return axes[:gone] + axes[gone + 1 :]
    return None
