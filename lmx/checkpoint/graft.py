"""Weights of another model as a start: all but the heads must be the same, and what is not taken over is said."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import jax

from lmx.nn.module import Params

HEADS = ("head", "tasks")
"""Parts of the parameters that a model for another task may lack, or have beside."""
POOLER = re.compile(r"tasks/[^/]+/(transform/.+)")
"""What stands before a task's last map (BERT's pooler): taken over from another task's head, whole or not at all."""


@dataclass(frozen=True)
class Graft:
    """What becomes of the parameters.

    Attributes:
      fresh: of the new model, those of its heads that the other one does not have: they stay as they are initialised.
      left: of the other model, those of its heads that the new one does not have.
      pooler: of the new model, those that the other one has before another task's last map, and by which name there.
    """

    fresh: tuple[str, ...]
    left: tuple[str, ...]
    pooler: Mapping[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """The end of a sentence, empty where everything is taken over."""
        parts = (("starts fresh", "start fresh", self.fresh), ("is left out", "are left out", self.left))
        told = [f"{_joined(names)} {one if len(names) == 1 else many}" for one, many, names in parts if names]
        if self.pooler:
            told.append(f"{_joined(tuple(self.pooler))} from {_joined(tuple(self.pooler.values()))}")
        return "".join(f"; {part}" for part in told)

    def joined(self, own: Params, other: Params) -> Params:
        """The other's parameters, but ``own`` where they are fresh."""

        def one(path: Any, leaf: Any) -> Any:
            name = name_of(path)
            return leaf if name in self.fresh else found[self.pooler.get(name, name)]

        found = {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(other)}
        return cast(Params, jax.tree.map_with_path(one, own))


def graft(own: Params, other: Params) -> Graft | None:
    """How to start a model with parameters of the shapes ``own`` from one of the shapes ``other``; None if they
    differ in more than their heads."""
    mine, theirs = ({name_of(p): leaf.shape for p, leaf in jax.tree.leaves_with_path(t)} for t in (own, other))
    fresh = tuple(name for name, shape in mine.items() if theirs.get(name) != shape)
    left = tuple(name for name, shape in theirs.items() if mine.get(name) != shape)
    if any(name.split("/")[0] not in HEADS for name in (*fresh, *left)):
        return None
    ours, others = _pooler(fresh), _pooler(left)
    whole = {rest: mine[n] for rest, n in ours.items()} == {rest: theirs[n] for rest, n in others.items()}
    pooler = {name: others[rest] for rest, name in ours.items()} if whole else {}
    left = tuple(name for name in left if name not in pooler.values())
    return Graft(tuple(name for name in fresh if name not in pooler), left, pooler)


def _pooler(names: Iterable[str]) -> dict[str, str]:
    """What stands before a task's last map, by its name there."""
    return {found[1]: name for name in names if (found := POOLER.fullmatch(name))}


def name_of(path: Any) -> str:
    """A parameter's name: ``stack/segment_0/...``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _joined(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
