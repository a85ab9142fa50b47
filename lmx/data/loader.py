"""From rows to global arrays: the batch of a step is the same for any number of devices and processes."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lmx.data.layout import Row

Batch = dict[str, jax.Array]


class Loader(Iterator[Batch]):
    """Batches of ``rows`` from ``start_step`` on, read ahead in a thread.

    Row ``step * batch + slot`` stands in slot ``slot`` of the batch of ``step``, so a position in the data
    is a step and nothing else. Each process reads the rows that its devices hold. Finite rows end with a
    batch that is filled up with padding rows (``segment_ids`` 0).

    Args:
      rows: random-access rows, such as those of :mod:`lmx.data.rows`; its length may be ``sys.maxsize``.
      batch: rows in a global batch.
      sharding: how each array ``[batch, length]`` lies on the devices; None puts it on the default device.
      start_step: the step of the first batch.
      prefetch: batches to have ready.

    Yields:
      dicts of int32 ``[batch, length]``: the rows' arrays, each of its own length.
    """

    def __init__(
        self,
        rows: Any,
        *,
        batch: int,
        sharding: jax.sharding.Sharding | None = None,
        start_step: int = 0,
        prefetch: int = 2,
    ) -> None:
        self._rows, self._batch, self._sharding = rows, batch, sharding
        self._padding: Row = {key: np.zeros_like(array) for key, array in rows[0].items()}
        self._steps = range(start_step, -(-len(rows) // batch))
        self._queue: queue.Queue[Batch | Exception | None] = queue.Queue(max(prefetch, 1))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="lmx-loader", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        item = None if self._closed.is_set() else self._queue.get()
        if isinstance(item, dict):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    @property
    def ready(self) -> bool:
        """Whether the next batch is there already."""
        return not self._queue.empty()

    def close(self) -> None:
        """Stops reading; later batches are not to be had. Closing twice is fine."""
        self._closed.set()
        while self._thread.is_alive():  # a thread that waits for room finds it, and then finds that it is closed
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        try:
            for step in self._steps:
                if self._closed.is_set():
                    return
                self._queue.put(self.read(step))
            self._queue.put(None)
        except Exception as error:  # raised in the consumer, by __next__
            self._queue.put(error)

    def read(self, step: int) -> Batch:
        """The batch of any step."""
        cached: dict[int, Row] = {}

        def row(slot: int) -> Row:
            if slot not in cached:
                index = step * self._batch + slot
                cached[slot] = self._rows[index] if index < len(self._rows) else self._padding
            return cached[slot]

        return {key: self._array(key, row) for key in self._padding}

    def _array(self, key: str, row: Any) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            slots = range(*index[0].indices(self._batch))
            return np.stack([row(slot)[key] for slot in slots])[:, index[1]]

        if self._sharding is None:
            return jax.numpy.asarray(shard((slice(None), slice(None))))
        return jax.make_array_from_callback((self._batch, len(self._padding[key])), self._sharding, shard)
