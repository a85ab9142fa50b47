import threading
from itertools import islice
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmx.data.loader import Loader
from lmx.data.prepare import Prepared
from lmx.data.rows import KEYS, held_out_rows, train_rows

LENGTH = 32


def meshes() -> list[NamedSharding | None]:
    devices = np.array(jax.devices())
    found: list[NamedSharding | None] = [
        None,
        NamedSharding(Mesh(devices[:1], ("data",)), PartitionSpec("data")),
        NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data")),
    ]
    if len(devices) >= 4:
        grid = Mesh(devices[:4].reshape(2, 2), ("data", "sequence"))
        found += [NamedSharding(grid, PartitionSpec(*s)) for s in (("data", "sequence"), (None,), (None, "data"))]
    return found


def numbers(batch: dict[str, jax.Array]) -> list[list[int]]:
    return [np.asarray(batch[key]).tolist() for key in KEYS]


@pytest.mark.parametrize("sharding", meshes())
def test_batches_are_the_rows_in_order_on_any_devices(prepared: Prepared, sharding: Any) -> None:
    rows = train_rows(prepared, length=LENGTH, seed=0)
    with Loader(rows, batch=8, sharding=sharding, start_step=3) as loader:
        for step, batch in zip((3, 4), loader, strict=False):
            assert set(batch) == set(KEYS)
            for name in KEYS:
                assert batch[name].shape == (8, LENGTH)
                assert batch[name].dtype == np.int32
                expected = np.stack([rows[step * 8 + slot][name] for slot in range(8)])
                assert np.array_equal(np.asarray(batch[name]), expected)
                assert sharding is None or batch[name].sharding == sharding


def test_only_needed_rows_are_read_and_each_once() -> None:
    read: list[int] = []

    class Rows:
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            read.append(index)
            return {key: np.full(4, index, np.int32) for key in KEYS}

    mesh = Mesh(np.array(jax.devices()), ("data",))
    with Loader(Rows(), batch=8, sharding=NamedSharding(mesh, PartitionSpec("data"))) as loader:
        loader.close()
        read.clear()
        loader.read(5)
    assert sorted(read) == list(range(40, 48))


def test_a_finite_end_is_filled_with_padding(prepared: Prepared) -> None:
    rows = held_out_rows(prepared, length=LENGTH)
    batch_size = 7
    batches = list(Loader(rows, batch=batch_size))
    assert len(batches) == -(-len(rows) // batch_size)
    stacked = np.concatenate([np.asarray(b["tokens"]) for b in batches])
    assert np.array_equal(stacked[: len(rows)], np.stack([r["tokens"] for r in rows]))
    ids = np.concatenate([np.asarray(b["segment_ids"]) for b in batches])
    assert (ids[len(rows) :] == 0).all()
    assert (ids[: len(rows), 0] == 1).all()


def test_starting_later_is_the_same_as_skipping(prepared: Prepared) -> None:
    rows = train_rows(prepared, length=LENGTH, seed=0)
    with Loader(rows, batch=4) as first, Loader(rows, batch=4, start_step=5) as later:
        assert [numbers(b) for b in islice(first, 5, 8)] == [numbers(b) for b in islice(later, 3)]


def test_an_error_in_the_thread_reaches_the_consumer() -> None:
    class Rows:
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            if index == 6:
                raise ValueError("row 6 is broken")
            return {key: np.zeros(4, np.int32) for key in KEYS}

    loader = Loader(Rows(), batch=2)
    assert len([next(loader) for _ in range(3)]) == 3
    with pytest.raises(ValueError, match="row 6 is broken"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_closing_ends_the_thread(prepared: Prepared) -> None:
    before = threading.active_count()
    loader = Loader(train_rows(prepared, length=LENGTH, seed=0), batch=4, prefetch=1)
    next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)
