"""Choosing a checkpoint that can be trusted, and loading it to where the program wants it."""

import json
import os
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1

from lmx.checkpoint import manifest, tree
from lmx.errors import LmxError, UserError
from lmx.files import is_local
from lmx.sharding.processes import share
from lmx.sharding.storage import storage

META, STATE, SAVING = "meta.json", "state", "saving"
CUT_OFF = "its save was cut off before it was complete"
Skipped = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Restored:
    """A loaded checkpoint."""

    step: int
    """How many steps the state had seen."""
    state: Any
    """The arrays, in the structure that was asked for."""
    meta: dict[str, Any]
    """What the program saved beside it."""
    skipped: Skipped
    """The newer steps that were passed over, newest first, each with the reason."""
    local: bool = False
    """Whether it comes from the node-local tier."""


def load(directory: epath.Path, target: Any, step: int, skipped: Skipped) -> Restored:
    """The step that :func:`choose` found good."""
    return _load(directory, step, skipped, (), target, None)


def load_subtree(
    directory: str | os.PathLike[str],
    key: str,
    target: Any = None,
    step: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Restored:
    """Loads one part of a saved state, such as ``params``; the rest is verified but not loaded.

    Args:
      directory: where the checkpoints are.
      key: the part's name at the top of the state; ``a/b`` goes further down.
      target: a pytree of ``jax.ShapeDtypeStruct`` for that part; without one, it comes as nested dicts with
        string keys, in the shapes and dtypes that are stored.
      step: the step to load; by default the newest good one.
      sharding: where leaves go that bring no sharding of their own; by default, the default device.

    Raises:
      UserError: there is no checkpoint, no such step or no such part, or the part is not as ``target`` says.
      LmxError: there are checkpoints, and each is damaged.
    """
    path = absolute(directory)
    chosen, skipped = choose(path, step)
    if chosen is None:
        raise UserError(f"there is no checkpoint in {path}; name a directory in which a run was saved")
    return _load(path, chosen, skipped, tuple(key.split("/")), target, sharding)


def absolute(directory: str | os.PathLike[str]) -> epath.Path:
    """The directory as Orbax wants it: a local path from the root, or an object store's address as it is.

    Raises:
      UserError: see :func:`lmx.sharding.storage.storage`.
    """
    path = storage(directory)
    return path.expanduser().resolve() if is_local(path) else path


def listed(directory: epath.Path) -> tuple[int, ...]:
    """The steps that have a directory, complete or not, oldest first."""
    if not directory.exists():
        return ()
    return tuple(sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal()))


def is_cut_off(directory: epath.Path, step: int) -> bool:
    """Whether ``step`` is the one that was being saved when its process ended."""
    saving = directory / SAVING
    marked = saving.exists() and saving.read_text().strip() == str(step)
    return marked and not manifest.exists(directory / str(step))


def choose(directory: epath.Path, step: int | None) -> tuple[int | None, Skipped]:
    """The newest good step, the same on every process, and the newer ones with what is wrong with them."""
    steps = tuple(json.loads(share(json.dumps(listed(directory)))[0]))
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise UserError(f"there is no checkpoint of step {step} in {directory}; the steps there are: {known}")
    skipped: list[tuple[int, str]] = []
    for candidate in (step,) if step is not None else reversed(steps):
        reason = _problem(directory, candidate)
        if reason is None:
            return candidate, tuple(skipped)
        skipped.append((candidate, reason))
    if step is None and all(reason == CUT_OFF for _, reason in skipped):
        return None, tuple(skipped)
    reasons = "; ".join(f"step {s}: {reason}" for s, reason in skipped)
    raise LmxError(f"no checkpoint in {directory} can be trusted: {reasons}")


def _problem(directory: epath.Path, step: int) -> str | None:
    if is_cut_off(directory, step):
        own: str | None = CUT_OFF
    else:
        own = manifest.problem(directory / str(step), step, jax.process_index(), jax.process_count())
    return next(filter(None, share(own or "")), None)


def _load(
    directory: epath.Path,
    step: int,
    skipped: Skipped,
    part: tree.Name,
    target: Any,
    sharding: jax.sharding.Sharding | None,
) -> Restored:
    path, what = directory / str(step), f"the checkpoint of step {step} in {directory}"
    stored = tree.named_leaves(v1.metadata(path, STATE).metadata)
    below = {name[len(part) :]: leaf for name, leaf in stored.items() if name[: len(part)] == part}
    if not below:
        known = ", ".join(sorted({name[0] for name in stored}))
        raise UserError(f"{what} has no part {'/'.join(part)!r}; its parts are: {known}")
    wanted = below if target is None else tree.named_leaves(target)
    tree.check_fits(below, wanted, what)
    arrays = _load_arrays(path, {part + name: _placed(leaf, sharding) for name, leaf in wanted.items()})
    loaded = {name: arrays[part + name] for name in wanted}
    structure = jax.tree.structure(target)
    state = tree.nest(loaded) if target is None else jax.tree.unflatten(structure, loaded.values())
    return Restored(step, state, json.loads((path / META).read_text()), skipped)


def _load_arrays(path: epath.Path, leaves: dict[tree.Name, jax.ShapeDtypeStruct]) -> dict[tree.Name, Any]:
    context = v1.Context()
    context.pytree.loading.partial_load = True
    with context:
        return tree.named_leaves(v1.load(path, tree.nest(leaves), checkpointable_name=STATE))


def _placed(leaf: Any, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    own = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own or sharding or default)
