"""The packing plan: which pieces of which documents share a row.

A document of n tokens has a stream of n + 2 (an end token before and after) and n + 1 predictions. A piece of
``count`` predictions is ``stream[start : start + count + 1]`` and takes ``count`` positions of a row:
position j holds token j and predicts token j + 1. Pieces of one document overlap by one token, so each token
of a stream but its first is predicted exactly once, in one row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lmx.data import cache
from lmx.data.layout import Labels, Layout, Whole
from lmx.errors import UserError

WINDOW = 65_536  # documents packed together: fill 0.9999, and memory that does not grow with the corpus
PIECE = np.dtype([("document", "<i8"), ("start", "<i4"), ("count", "<i4")])
Packing = Literal["best_fit", "split"]


@dataclass(frozen=True)
class Plan:
    """Rows of pieces, memory-mapped.

    Attributes:
      length: positions in a row.
      pieces: :data:`PIECE` ``[pieces]``, those of a row together.
      offsets: int64 ``[rows + 1]``, where each row's pieces begin.
      cut: documents that lie in more than one row; of examples, those that are truncated to fit one, or split.
      dropped: documents that are left out, because they take more than a row.
      untaught: examples that are left out, because nothing is left to learn of them once they are truncated.
      filled: positions that examples take; -1 of texts, which take as many as there are predictions.
    """

    length: int
    pieces: np.ndarray
    offsets: np.ndarray
    cut: int
    dropped: int = 0
    untaught: int = 0
    filled: int = -1

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> np.ndarray:
        """The pieces of a row, :data:`PIECE` ``[pieces in the row]``."""
        return self.pieces[self.offsets[index] : self.offsets[index + 1]]

    @property
    def padding(self) -> float:
        """Share of positions that hold no piece."""
        positions = len(self) * self.length
        filled = int(self.pieces["count"].sum(dtype=np.int64)) if self.filled < 0 else self.filled
        return 1 - filled / positions if positions else 0.0


def make_plan(
    lengths: np.ndarray,
    documents: np.ndarray,
    layout: Layout,
    packing: Packing,
    directory: Path,
    targets: np.ndarray | None = None,
    labels: Labels = lambda document: np.zeros(0, np.int32),
) -> Plan:
    """Plans rows of ``layout`` and writes them to ``directory``, or opens what is there.

    Args:
      lengths: int ``[all documents]``, tokens in each document.
      documents: int ``[chosen]``, the documents to pack, in order.
      layout: how long rows are, and what a piece takes of one.
      packing: ``best_fit`` keeps documents (or the rest of one longer than a row) whole; ``split`` cuts at
        every row.
      directory: where the plan lives.
      targets: int ``[all documents]``, tokens in each example's target or second text, for a layout of examples.
      labels: an example's labels, where it has some.

    Raises:
      UserError: ``split``, of a layout whose pieces take more of a row than their tokens.
    """
    if packing == "split" and (layout.identity or layout.whole):
        raise UserError(
            'data.packing is "split", which cuts the text at every row; this objective puts more than its tokens into '
            'a row, so it needs "best_fit"'
        )
    if not directory.exists():
        with cache.locked(directory.parent):
            if not directory.exists():
                with cache.whole_dir(directory) as temporary:
                    if layout.whole is not None and targets is not None:
                        _write(*_planned_whole(lengths, targets, documents, layout, layout.whole, labels), temporary)
                    else:
                        _write(_planned(lengths, documents, layout, packing), {}, temporary)
    meta = cache.read_json(directory / "meta.json")
    return Plan(
        layout.length,
        _mapped(directory / "pieces.bin", PIECE),
        _mapped(directory / "offsets.bin", np.dtype("<i8")),
        meta["cut"],
        meta.get("dropped", 0),
        meta.get("untaught", 0),
        meta.get("filled", -1),
    )


def _planned_whole(
    lengths: np.ndarray, targets: np.ndarray, documents: np.ndarray, layout: Layout, whole: Whole, labels: Labels
) -> tuple[Iterator[tuple[np.ndarray, np.ndarray]], dict[str, int]]:
    """As :func:`_planned`, of examples that lie whole in one row; and how many are cut to fit one, or left out."""
    ours, theirs = (np.asarray(of[documents], np.int64) for of in (lengths, targets))
    taught, length = np.ones(len(documents), bool), layout.length
    if whole.longer == "truncate":
        long = np.flatnonzero(whole.room(ours, theirs) > length)
        taught[long] = layout.taught(documents[long], labels)
    pieces, sizes, counts = windows_of(documents[taught], ours[taught], theirs[taught], length, whole)
    counts["untaught"] = int((~taught).sum())

    def windows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        row = 0
        for first in range(0, len(pieces), WINDOW):
            window = slice(first, first + WINDOW)
            found, rows = _in_rows(pieces[window], best_fit(sizes[window], length))
            yield found, rows + row
            row += int(rows[-1]) + 1

    return windows(), counts


def windows_of(
    documents: np.ndarray, lengths: np.ndarray, targets: np.ndarray, length: int, whole: Whole
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """The pieces [pieces] of examples, the positions that each takes, and how many are cut, dropped and filled.

    A piece is a whole example; where longer ones are split, it is a window of its tokens.
    """
    rooms = whole.room(lengths, targets)
    long = rooms > length
    if whole.longer == "truncate":
        sizes = np.minimum(rooms, length)
        pieces = _pieces(documents, np.zeros_like(lengths), lengths)
        return pieces, sizes, {"cut": int(long.sum()), "filled": int(sizes.sum())}
    # Tokens of a window: what the second text and what stands around leave.
    free = np.where(long, length - whole.room(np.zeros_like(lengths), targets), lengths)
    fits = ~long if whole.longer == "drop" else ~long | (free > whole.overlap)
    step = np.maximum(free - whole.overlap, 1)
    count = np.where(long, 1 + -(-(lengths - free) // step), 1)[fits]
    owner = np.repeat(np.flatnonzero(fits), count)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    starts = nth * step[owner]
    held = np.minimum(free[owner], lengths[owner] - starts)
    sizes = whole.room(held, targets[owner])
    counts = {"cut": int((count > 1).sum()), "dropped": int((~fits).sum()), "filled": int(sizes.sum())}
    return _pieces(documents[owner], starts, held), sizes, counts


def _planned(
    lengths: np.ndarray, documents: np.ndarray, layout: Layout, packing: Packing
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each window: its pieces in row order, and the row of each, counted from the first row of all."""
    position = row = 0
    for first in range(0, len(documents), WINDOW):
        window = np.asarray(documents[first : first + WINDOW], np.int64)
        predictions = np.asarray(lengths[window], np.int64) + 1
        if packing == "split":
            pieces, rows = split_window(window, predictions, layout.length, position)
            position += int(predictions.sum())
        else:
            pieces, rows = best_fit_window(window, predictions, layout)
            rows += row
            row = int(rows[-1]) + 1
        yield pieces, rows


def _write(windows: Iterator[tuple[np.ndarray, np.ndarray]], counts: dict[str, int], directory: Path) -> None:
    total, last_row, cut = 0, -1, 0
    with (
        (directory / "pieces.bin").open("wb") as pieces_file,
        (directory / "offsets.bin").open("wb") as offsets_file,
    ):
        for pieces, rows in windows:
            pieces.tofile(pieces_file)
            new = np.flatnonzero(np.diff(rows, prepend=last_row))
            (total + new).astype("<i8").tofile(offsets_file)
            total, last_row = total + len(pieces), int(rows[-1])
            cut += int((np.unique(pieces["document"], return_counts=True)[1] > 1).sum())
        np.array([total], "<i8").tofile(offsets_file)
    cache.write_json(directory / "meta.json", {"cut": cut, **counts})


def _mapped(file: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(file, dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)


def _pieces(document: np.ndarray, start: np.ndarray, count: np.ndarray) -> np.ndarray:
    pieces = np.empty(len(document), PIECE)
    pieces["document"], pieces["start"], pieces["count"] = document, start, count
    return pieces


def split_window(
    documents: np.ndarray, predictions: np.ndarray, length: int, position: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces and rows of documents laid end to end from ``position``, cut at each multiple of ``length``."""
    starts = position + np.concatenate([[0], np.cumsum(predictions)])
    edges = np.arange(-(-position // length) * length, starts[-1], length)
    cuts = np.union1d(starts[:-1], edges)
    owner = np.searchsorted(starts, cuts, side="right") - 1
    counts = np.diff(cuts, append=starts[-1])
    return _pieces(documents[owner], cuts - starts[owner], counts), cuts // length


def best_fit_window(documents: np.ndarray, predictions: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Pieces and rows of documents packed by best fit; rows in the order of their first documents."""
    longest = len(layout.rooms) - 1
    full, rest = predictions // longest, predictions % longest
    owner = np.repeat(np.arange(len(documents)), full)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(full) - full, full)
    tail = np.flatnonzero(rest)
    pieces = _pieces(
        documents[np.concatenate([owner, tail])],
        np.concatenate([nth, full[tail]]) * longest,
        np.concatenate([np.full(len(owner), longest), rest[tail]]),
    )
    bins = np.concatenate([np.arange(len(owner)), len(owner) + best_fit(layout.rooms[rest[tail]], layout.length)])
    order = np.lexsort((pieces["start"], np.concatenate([owner, tail])))
    return _in_rows(pieces[order], bins[order])


def _in_rows(pieces: np.ndarray, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pieces by row, and the row of each: the bins in the order of their first pieces."""
    _, first, inverse = np.unique(bins, return_index=True, return_inverse=True)
    rows = np.argsort(np.argsort(first))[inverse]
    order = np.argsort(rows, kind="stable")
    return pieces[order], rows[order]


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each size, int64 ``[sizes]``, by best-fit decreasing: into the fullest bin that has room.

    Equal sizes are placed together, and bins with equal room are interchangeable. So the work grows with the
    number of different sizes and not of items (a window of 65,536 documents takes some tens of milliseconds).
    """
    order = np.argsort(-sizes, kind="stable")
    values, counts = np.unique(sizes, return_counts=True)
    bins = np.empty(len(sizes), np.int64)
    room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room that is left in them
    occupied = bins_used = done = 0  # occupied: bit r is set where room[r] has bins
    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            above = occupied >> size
            if above:
                left = size + (above & -above).bit_length() - 1
                candidates = room[left]
            else:
                left = capacity
                candidates = list(range(bins_used, bins_used + -(-count // (capacity // size))))
                bins_used += len(candidates)
            each = left // size
            taken = min(len(candidates), -(-count // each))
            chosen = candidates[len(candidates) - taken :]
            del candidates[len(candidates) - taken :]
            if above and not candidates:
                occupied &= ~(1 << left)
            placed = min(count, taken * each)
            bins[order[done : done + placed]] = np.repeat(chosen, each)[:placed]
            remaining = [left - size * each] * taken
            remaining[-1] = left - size * (placed - (taken - 1) * each)
            for bin_, space in zip(chosen, remaining, strict=True):
                room[space].append(bin_)
                occupied |= 1 << space
            occupied &= ~1
            room[0].clear()
            done, count = done + placed, count - placed
    return bins
