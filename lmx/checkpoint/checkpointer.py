"""Checkpoints of a run: saved while training goes on, verified when loaded, never half-written.

On disk, below the directory of the checkpoints::

    400/manifest.json    size and SHA-256 of every other file here; written last: the step is complete
    400/meta.json        what the program added, such as the position in the data
    400/state/           the arrays, as Orbax stores them: nested dicts with string keys
    saving               the step that is being written, if any; after a crash, the one that was cut off

Orbax moves the bytes, in any sharding, from any number of processes. What it leaves to its user is done here:
no save is dropped, no dtype is cast, no damaged or half-written step is chosen.
"""

import errno
import functools
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1

from lmx.checkpoint import loading, manifest, tree
from lmx.checkpoint.config import CheckpointConfig
from lmx.checkpoint.loading import META, SAVING, STATE, Restored, Skipped, load_subtree
from lmx.checkpoint.local import NOWHERE, LocalTier
from lmx.errors import LmxError
from lmx.files import write_durably
from lmx.sharding.processes import count, post, posted, share

LOOK = 0.5
"""Seconds between looks at whether the save in flight failed on another process."""
MIN_SLICE_BYTES = 1 << 20
"""From this size on each replica writes a part of an array; below, one of them writes it all."""


class Raised(logging.Filter):
    """Keeps back what Orbax logs, with a traceback for each of its threads, of an error that it raises too."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is of something else."""
        return "_SignalingThread.run() raised" not in record.getMessage()


RAISED = Raised()
__all__ = ["Checkpointer", "Restored", "load_subtree"]


class Checkpointer:
    """Saves and restores the state of one run. A context manager; leaving it waits for the save in flight.

    With several processes, all of them call each method; process 0 alone writes manifests and removes steps.

    Args:
      directory: where the checkpoints are: a local path, or an object store's address (``gs://bucket/run``).
      config: which checkpoints stay, and whether saving waits.
      local: the node-local tier beside it, if there is one.
    """

    def __init__(self, directory: str | os.PathLike[str], config: CheckpointConfig, local: LocalTier | None = None):
        self.directory = loading.absolute(directory)
        self.config, self.local = config, local
        self._pool = _one_thread()
        self._pending: tuple[int, Future[None]] | None = None
        self._current: int | None = None
        self._distrusted: frozenset[int] = frozenset()
        self._saves, self._failed = 0, False
        self._best = 0
        logging.getLogger("absl").addFilter(RAISED)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def steps(self) -> tuple[int, ...]:
        """The steps that were saved to the end, oldest first; their content is verified only when loaded."""
        return tuple(s for s in loading.listed(self.directory) if manifest.exists(self.directory / str(s)))

    def save(self, step: int, state: Any, meta: dict[str, Any], *, force: bool = False, best: int = 0) -> None:
        """Saves a state. It may be donated as soon as this returns: what is written is the state as it was.

        Waits for the save in flight, if any; if that failed, this one is completed before the error is raised. When a
        save is complete, the steps that the keep rules do not want are removed, and those after ``step`` too: they
        belong to a course that was given up.

        Args:
          step: how many steps the state has seen. The step that this object saved or restored last is
            not written again, unless ``force``.
          state: a pytree of ``jax.Array``.
          meta: JSON data to keep beside it.
          best: the step of the best evaluation so far, for the keep rules; 0 for none.

        Raises:
          LmxError: this save, or the one in flight, failed (on a full disk). Older checkpoints are intact.
        """
        lost = self._lost()
        self._best = best
        if step != self._current or force:
            self._start(step, state, json.dumps(meta, indent=1))
        if lost or not self.config.asynchronous:
            self.wait()
        if lost:
            raise LmxError(f"{lost} (step {step} was saved)") from lost

    @property
    def failing(self) -> bool:
        """Whether the save in flight, of either tier, has failed on this process. The next call says how."""
        pending = [self._pending, self.local.pending if self.local else None]
        return any(future.done() and future.exception() is not None for _, future in filter(None, pending))

    def _lost(self) -> LmxError | None:
        """What became of the save in flight, if it failed on any process."""
        try:
            self.wait()
        except LmxError as error:
            return error
        return None

    def _start(self, step: int, state: Any, note: str) -> None:
        """Returns when the host holds the bytes. On CPU it holds the buffers themselves: JAX then refuses to donate
        them, and the next step gets new ones."""
        arrays = tree.storable(state)
        self._check(step, self._pool.submit(self._begin, step).exception())
        self._saves += 1
        try:
            with _saving():
                written = v1.save_async(self.directory / str(step), arrays, checkpointable_name=STATE).result
        except Exception as error:
            written = functools.partial(_fail, error)
        self._pending = step, self._pool.submit(self._finish, step, written, note)

    def wait(self) -> None:
        """Returns when the save in flight, if any, is complete on every process.

        Raises:
          LmxError: it failed. Older checkpoints are intact, and a later save may succeed.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        self._check(step, self._outcome(future))
        self._current = step

    def _outcome(self, future: Future[None]) -> BaseException | None:
        """What the save in flight came to on this process, or that it failed on another.

        Inside Orbax this process would wait for one that failed until a time-out of ten minutes: the thread that does
        is left to itself, and what comes next gets another.
        """
        while True:
            try:
                return future.exception(LOOK)
            except TimeoutError:
                failed = posted(self._topic) if count() > 1 else {}
                if failed:
                    self._pool.shutdown(wait=False)
                    self._pool = _one_thread()
                    return LmxError(failed[min(failed)])

    def close(self) -> None:
        """Waits for the saves in flight and ends the background threads."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._failed and jax.process_index() == 0:
                _remove_leftovers(self.directory)
            if self.local:
                self.local.close()

    def restore(self, target: Any, step: int | None = None) -> Restored | None:
        """Loads the newest good checkpoint of either tier, or the durable one of ``step``.

        Args:
          target: a pytree of ``jax.ShapeDtypeStruct``; each leaf lands in its own sharding, whatever the mesh
            it was saved from, or on the default device if it has none.
          step: the step to load; no other will do.

        Returns:
          ``None`` when no save was ever completed here.

        Raises:
          UserError: its names, shapes or dtypes are not those of ``target``, or there is no such ``step``.
          LmxError: there are checkpoints, and each is damaged.
        """
        self.wait()
        local = self.local.newest(target) if self.local is not None and step is None else NOWHERE
        newest, skipped = self._choose(step, needed=not local.step)
        self._distrusted = frozenset(s for s, _ in skipped)
        if local.step > (newest or 0):
            self._current = None
            return local.load(target, skipped)
        self._current = newest
        if newest is None:
            return None
        passed = tuple((s, reason) for s, reason in local.skipped if s > newest)
        return loading.load(self.directory, target, newest, (*skipped, *passed))

    def _choose(self, step: int | None, *, needed: bool) -> tuple[int | None, Skipped]:
        """The newest durable step that is good; none that is good is an error only if one is needed."""
        try:
            return loading.choose(self.directory, step)
        except LmxError:
            if needed:
                raise
            return None, tuple((s, "it is damaged") for s in reversed(self.steps()))

    @property
    def _topic(self) -> str:
        """Under which a process tells that the save in flight failed."""
        return f"save-{self._saves}-failed"

    def _begin(self, step: int) -> None:
        """Marks the step as unfinished, and removes what stands in its place."""
        if jax.process_index() != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.directory)
        write_durably(self.directory / SAVING, f"{step}\n")
        _remove(self.directory / str(step))

    def _finish(self, step: int, written: Callable[[], None], note: str) -> None:
        try:
            written()
            if jax.process_index() == 0:
                write_durably(self.directory / str(step) / META, note)
                manifest.write(self.directory / str(step), step)
        except BaseException as error:
            if count() > 1:
                post(self._topic, _explain(error))
            if jax.process_index() == 0:
                _remove_leftovers(self.directory)
            raise
        if jax.process_index() == 0:
            (self.directory / SAVING).unlink(missing_ok=True)
            self._prune(step)

    def _prune(self, newest: int) -> None:
        self._distrusted -= {newest}
        kept = self.config.kept((s for s in set(self.steps()) - self._distrusted if s <= newest), self._best)
        for step in set(loading.listed(self.directory)) - kept:
            _remove(self.directory / str(step))

    def _check(self, step: int, error: BaseException | None) -> None:
        """Raises on every process what went wrong on any."""
        reason = next(filter(None, share("" if error is None else _explain(error))), None)
        if reason is not None:
            self._failed = True
            raise LmxError(
                f"step {step} was not saved in {self.directory}, older checkpoints are intact: {reason}"
            ) from error


def _one_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")


def _fail(error: Exception) -> None:
    raise error


def _saving() -> v1.Context:
    """Zstandard takes 8% off normally distributed weights, and saves take over twice as long on two cores. That each
    replica writes a part of an array takes a program that cuts it: one for every shape, which small ones are not worth.
    """
    context = v1.Context()
    context.array.saving.use_compression = False
    context.array.saving.min_slice_bytes_for_replica_parallel = MIN_SLICE_BYTES
    return context


def _remove(directory: epath.Path) -> None:
    """Removes a step, its manifest first: from then on nobody takes it for a good one."""
    (directory / manifest.FILE).unlink(missing_ok=True)
    if directory.exists():
        directory.rmtree()


def _remove_leftovers(directory: epath.Path) -> None:
    """Removes what a save left behind that ended too early."""
    for path in directory.glob("*.orbax-checkpoint-tmp*"):
        with suppress(OSError):  # Orbax may still be writing there; the next save, or the end, removes the rest
            path.rmtree()
    for step in loading.listed(directory):
        if loading.is_cut_off(directory, step):
            _remove(directory / str(step))


def _explain(error: BaseException) -> str:
    if isinstance(error, LmxError):
        return str(error)
    full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
    return "the disk is full; free some space and run the same command again" if full else repr(error)
