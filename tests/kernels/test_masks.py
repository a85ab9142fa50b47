import numpy as np
import pytest

from lmx.kernels.masks import Bidirectional, BidirectionalWindow, Causal, Chunked, SlidingWindow

MASKS = [Bidirectional(), Causal(), SlidingWindow(5), SlidingWindow(1), BidirectionalWindow(3), Chunked(4), Chunked(1)]
# Positions start again in each document; the last one starts late, and skips some.
DOCUMENTS = [np.arange(7), np.arange(11), np.array([3, 4, 6, 7, 9, 20, 21])]
POSITIONS = np.concatenate(DOCUMENTS).astype(np.int32)
SEGMENTS = np.repeat([1, 2, 3], [len(d) for d in DOCUMENTS])


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_reach_leaves_out_no_key_that_is_seen(mask):
    length = len(POSITIONS)
    seen = np.asarray(mask.allowed(POSITIONS[:, None], POSITIONS[None])) & (SEGMENTS[:, None] == SEGMENTS)
    for start in range(length):
        for stop in range(start + 1, length + 1):
            first, last = mask.reach(start, stop, length)
            assert 0 <= first <= last <= length
            columns = np.flatnonzero(seen[start:stop].any(0))
            assert first <= columns.min()
            assert columns.max() < last


@pytest.mark.parametrize(
    ("mask", "reach"),
    [
        (Bidirectional(), (0, 100)),
        (Causal(), (0, 60)),
        (SlidingWindow(5), (46, 60)),
        (BidirectionalWindow(3), (47, 63)),
        (Chunked(4), (47, 60)),
        (SlidingWindow(1000), (0, 60)),
        (BidirectionalWindow(1000), (0, 100)),
    ],
    ids=repr,
)
def test_reach_is_no_wider_than_it_must_be(mask, reach):
    assert mask.reach(50, 60, 100) == reach


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (Causal(), range(9)),
        (SlidingWindow(3), [6, 7, 8]),
        (BidirectionalWindow(2), [6, 7, 8, 9, 10]),
        (Chunked(3), [6, 7, 8]),
        (Chunked(7), [7, 8]),
        (Chunked(8), [8]),
    ],
    ids=repr,
)
def test_what_position_8_sees(mask, seen):
    assert np.flatnonzero(mask.allowed(np.int32(8), np.arange(20, dtype=np.int32))).tolist() == list(seen)
