import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.data import packing
from lmx.data.layout import NextTokens
from lmx.data.packing import best_fit, make_plan

LENGTHS = st.lists(st.integers(1, 60), max_size=60)


def slow_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """Room left in each bin, one item at a time."""
    room: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, space in enumerate(room) if space >= size]
        if fitting:
            chosen = min(fitting, key=lambda i: room[i])
            room[chosen] -= size
        else:
            room.append(capacity - size)
    return sorted(room)


@given(st.lists(st.integers(1, 20), max_size=80), st.integers(20, 40))
def test_best_fit_fills_bins_as_the_plain_algorithm_does(sizes: list[int], capacity: int) -> None:
    bins = best_fit(np.array(sizes, np.int64), capacity)
    used = np.bincount(bins, weights=sizes) if sizes else np.array([])
    assert sorted(capacity - used) == slow_best_fit(sizes, capacity)


@settings(deadline=None)
@given(
    LENGTHS,
    st.integers(1, 25),
    st.sampled_from(["best_fit", "split"]),
    st.integers(1, 20),
    st.data(),
)
def test_every_token_of_a_stream_is_a_target_once(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    length: int,
    mode: packing.Packing,
    window: int,
    data: st.DataObject,
) -> None:
    chosen = [i for i in range(len(lengths)) if data.draw(st.booleans())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        directory = tmp_path_factory.mktemp("plan") / "plan"
        plan = make_plan(np.array(lengths, np.int32), np.array(chosen, np.int64), NextTokens(length), mode, directory)
    targets = []
    for row in range(len(plan)):
        pieces = plan.row(row).tolist()
        assert 0 < sum(count for *_, count in pieces) <= length
        targets += [(d, s + 1 + j) for d, s, count in pieces for j in range(count)]
    assert sorted(targets) == [(d, t) for d in chosen for t in range(1, lengths[d] + 2)]


@given(LENGTHS, st.integers(1, 25))
def test_split_is_full_but_for_the_last_row(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int
) -> None:
    directory = tmp_path_factory.mktemp("plan") / "plan"
    plan = make_plan(np.array(lengths, np.int32), np.arange(len(lengths)), NextTokens(length), "split", directory)
    total = sum(lengths) + len(lengths)
    assert len(plan) == -(-total // length)
    assert plan.padding == pytest.approx(1 - total / (len(plan) * length) if total else 0.0)


@given(LENGTHS, st.integers(1, 25))
def test_best_fit_keeps_what_fits_in_a_row_whole(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int
) -> None:
    directory = tmp_path_factory.mktemp("plan") / "plan"
    plan = make_plan(np.array(lengths, np.int32), np.arange(len(lengths)), NextTokens(length), "best_fit", directory)
    documents, counts = np.unique(plan.pieces["document"], return_counts=True)
    assert [-(-(lengths[d] + 1) // length) for d in documents] == counts.tolist()
    assert plan.cut == int((counts > 1).sum())


def test_a_plan_is_the_same_each_time_and_pads_little(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 200_000).astype(np.int32) + 1
    start = time.perf_counter()
    plan = make_plan(lengths, np.arange(len(lengths)), NextTokens(1024), "best_fit", tmp_path / "a")
    assert time.perf_counter() - start < 5  # 0.2 s when nothing else runs
    again = make_plan(lengths, np.arange(len(lengths)), NextTokens(1024), "best_fit", tmp_path / "b")
    assert plan.padding < 1e-3
    assert np.array_equal(plan.pieces, again.pieces)
    assert np.array_equal(plan.offsets, again.offsets)
