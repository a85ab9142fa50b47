"""Fast checkpoints on each node's own disk, beside the durable ones: a crash then costs few steps.

Each process writes the shards that its devices hold, once each, and waits for no other process and no network::

    LOCAL/RUN/process-3/420/shards.bin     the shards' bytes, one after the other
    LOCAL/RUN/process-3/420/shards.json    what they are, which attempt wrote them, and what the program added
    LOCAL/RUN/process-3/420/manifest.json  sizes and SHA-256 of both, written last

Such a step can be used only if every process finds all shards that its devices need, all of one attempt. On the mesh
that wrote them that is so unless a node was replaced; on another mesh or number of processes, only where the shards of
all lie on the disk that a process sees.
"""

import json
import math
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lmx.checkpoint import loading, manifest, tree
from lmx.checkpoint.loading import Restored, Skipped
from lmx.errors import LmxError
from lmx.files import write_durably
from lmx.sharding.processes import index, located, share

KEEP = 2
"""Steps that stay: a crash may find some processes one save ahead of others."""
DATA, CONTENT = "shards.bin", "shards.json"
Box = tuple[tuple[int, int], ...]


@dataclass
class Leaf:
    """What some processes saved of one array: its global shape, its dtype, and where the bytes of which part lie."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pieces: dict[Box, tuple[epath.Path, int]] = field(default_factory=dict)

    def covers(self, box: Box) -> bool:
        """Whether all of the box was saved. Pieces of one attempt are equal or disjoint."""
        shared = (_shared(piece, box) for piece in self.pieces)
        return sum(_size(part) for part in shared if part is not None) == _size(box)

    def read(self, box: Box) -> np.ndarray:
        """The values in the box."""
        values = np.empty([stop - start for start, stop in box], self.dtype)
        for piece, (file, offset) in self.pieces.items():
            shared = _shared(piece, box)
            if shared is not None:
                shape = tuple(stop - start for start, stop in piece)
                data = np.memmap(file, np.uint8, "r", offset, _size(piece) * self.dtype.itemsize)
                values[_within(shared, box)] = data.view(self.dtype).reshape(shape)[_within(shared, piece)]
        return values


@dataclass(frozen=True)
class Newest:
    """A whole local checkpoint; of step 0 when there is none.

    Attributes:
      step: how many steps the state had seen.
      leaves: its arrays by name.
      meta: what the program saved beside it.
      skipped: newer local steps that cannot be used, each with the reason.
    """

    step: int
    leaves: dict[tree.Name, Leaf]
    meta: dict[str, Any]
    skipped: Skipped

    def load(self, target: Any, skipped: Skipped) -> Restored:
        """The arrays, each where the target says; ``skipped`` are durable steps that were passed over."""
        arrays = [_array(self.leaves[name], wanted) for name, wanted in tree.named_leaves(target).items()]
        state = jax.tree.unflatten(jax.tree.structure(target), arrays)
        newer = tuple((s, reason) for s, reason in (*self.skipped, *skipped) if s > self.step)
        return Restored(self.step, state, self.meta, newer, local=True)


NOWHERE = Newest(0, {}, {}, ())
"""No local checkpoint."""


class LocalTier:
    """This process's part of the local checkpoints of one run; a context manager that waits for the last write.

    Args:
      directory: a path on each node's own disk.
      run: the run's name for itself, which no other run has.
    """

    def __init__(self, directory: str, run: str):
        self.root = loading.absolute(directory) / run
        self.folder = self.root / f"process-{index()}"
        self._attempt = share(uuid.uuid4().hex)[0]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="local-checkpoint")
        self.pending: tuple[int, Future[None]] | None = None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Writes this process's shards in the background, after waiting for the write before.

        The state may be donated as soon as this returns.

        Raises:
          LmxError: the write before failed.
        """
        self.wait()
        leaves = tree.named_leaves(tree.storable(state))
        shards = {name: _shards(leaf) for name, leaf in leaves.items()}
        described = [
            {"name": name, "dtype": leaf.dtype.name, "shape": leaf.shape, "boxes": list(shards[name])}
            for name, leaf in leaves.items()
        ]
        content = {"attempt": self._attempt, "meta": meta, "leaves": described}
        arrays = [array for boxes in shards.values() for array in boxes.values()]
        self.pending = step, self._pool.submit(self._write, step, content, arrays)

    def wait(self) -> None:
        """Returns when this process's last write is complete.

        Raises:
          LmxError: it failed.
        """
        if self.pending is None:
            return
        (step, future), self.pending = self.pending, None
        error = future.exception()
        if error is not None:
            raise LmxError(
                f"the local checkpoint of step {step} was not written in {self.folder}: {error}; free some space there,"
                " or set --checkpoint.local-every 0"
            ) from error

    def close(self, *, remove: bool = False) -> None:
        """Waits for the last write; ``remove`` then deletes what this process wrote."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if remove:
                shutil.rmtree(self.folder, ignore_errors=True)

    def newest(self, target: Any) -> Newest:
        """The newest step that is whole and good on all processes."""
        found = self._found()
        told = share(json.dumps(list(found)))
        skipped: list[tuple[int, str]] = []
        for step, attempt in sorted({(s, a) for text in told for s, a in json.loads(text)}, reverse=True):
            leaves, meta, own = self._examine(step, found.get((step, attempt), []), target)
            reason = next(filter(None, share(own)), "")
            if not reason:
                return Newest(step, leaves, meta, tuple(skipped))
            skipped.append((step, reason))
        return Newest(0, {}, {}, tuple(skipped))

    def _found(self) -> dict[tuple[int, str], list[epath.Path]]:
        """The complete steps on the disk that this process sees: by step and attempt the folders, its own first."""
        found: dict[tuple[int, str], list[epath.Path]] = {}
        for process in sorted(self.root.glob("process-*"), key=lambda path: (path != self.folder, path)):
            for step in loading.listed(process):
                folder = process / str(step)
                if manifest.exists(folder) and (folder / CONTENT).exists():
                    found.setdefault((step, str(_content(folder).get("attempt"))), []).append(folder)
        return found

    def _examine(
        self, step: int, folders: Sequence[epath.Path], target: Any
    ) -> tuple[dict[tree.Name, Leaf], dict[str, Any], str]:
        """What these folders hold, and why this process cannot use it, or nothing."""
        where, reason = f"the local checkpoint in {self.root}", "has no shards on this host"
        for part in (folders[:1], folders[1:] and folders):  # its own shards do, unless the mesh is another
            for folder in part:
                if problem := manifest.problem(folder, step):
                    return {}, {}, located(f"{where} is damaged: {folder.parent.name}: {problem}")
            if part:
                leaves, wanted = _leaves(part), tree.named_leaves(target)
                tree.check_fits(leaves, wanted, f"{where} of step {step}")
                short = (name for name, leaf in wanted.items() if not all(map(leaves[name].covers, _needed(leaf))))
                missing = next(short, None)
                if missing is None:
                    return leaves, _content(part[0])["meta"], ""
                reason = f"lacks shards of {'/'.join(missing)} for this mesh"
        return {}, {}, located(f"{where} {reason}")

    def _write(self, step: int, content: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
        folder = self.folder / str(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / DATA).open("wb") as file:
            for array in arrays:
                file.write(array.tobytes())
        write_durably(folder / CONTENT, json.dumps(content))
        manifest.write(folder, step)
        older = [s for s in loading.listed(self.folder) if s <= step]
        for other in set(loading.listed(self.folder)) - set(older[-KEEP:]):
            shutil.rmtree(self.folder / str(other))


def _content(folder: epath.Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / CONTENT).read_text()))
    except ValueError:  # damaged; the manifest will say so
        return {}


def _leaves(folders: Sequence[epath.Path]) -> dict[tree.Name, Leaf]:
    found: dict[tree.Name, Leaf] = {}
    for folder in folders:
        offset = 0
        for leaf in _content(folder)["leaves"]:
            dtype, name = jnp.dtype(leaf["dtype"]), tuple(leaf["name"])
            known = found.setdefault(name, Leaf(tuple(leaf["shape"]), dtype))
            for box in leaf["boxes"]:
                key = tuple((start, stop) for start, stop in box)
                known.pieces[key] = folder / DATA, offset
                offset += _size(key) * dtype.itemsize
    return found


def _shards(array: jax.Array) -> dict[Box, np.ndarray]:
    """The distinct shards of this process, copied to the host."""
    found: dict[Box, np.ndarray] = {}
    for shard in array.addressable_shards:
        box = _box(shard.index, array.shape)
        if box not in found:
            found[box] = np.array(shard.data)
    return found


def _needed(leaf: Any) -> list[Box]:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = sharding.addressable_devices_indices_map(leaf.shape)
    return [_box(cast(Sequence[slice], at), leaf.shape) for at in places.values()]


def _array(leaf: Leaf, wanted: Any) -> jax.Array:
    sharding = wanted.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(at: Any) -> np.ndarray:
        return leaf.read(_box(at, leaf.shape))

    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _box(at: Sequence[slice], shape: Sequence[int]) -> Box:
    return tuple((s.indices(size)[0], s.indices(size)[1]) for s, size in zip(at, shape, strict=True))


def _shared(one: Box, other: Box) -> Box | None:
    """What two boxes share, or None."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _within(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(inner, outer, strict=True))


def _size(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)
