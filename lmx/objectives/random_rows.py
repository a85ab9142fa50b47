"""Batches of random tokens in an objective's layout, packed as real ones are: for checks and measurements."""

from collections.abc import Sequence

import numpy as np

from lmx.data.layout import Layout, Piece, Row
from lmx.models.specs import ModelSpec
from lmx.objectives.objective import Objective
from lmx.objectives.vocabulary import Vocabulary


def random_rows(objective: Objective, spec: ModelSpec, batch: int, length: int, seed: Sequence[int]) -> Row:
    """``batch`` rows of random documents, int32 [batch, any] each: several segments, and padding."""
    rng, layout = np.random.default_rng(seed), random_layout(objective, spec, length)
    return _stacked(layout, [_pieces(rng, layout, spec.vocab) for _ in range(batch)], rng)


def full_rows(objective: Objective, spec: ModelSpec, batch: int, length: int) -> Row:
    """``batch`` rows of one random document each, as long as fits, int32 [batch, any] each."""
    rng, layout = np.random.default_rng(0), random_layout(objective, spec, length)
    return _stacked(layout, [[_longest(rng, layout, spec.vocab)] for _ in range(batch)], rng)


def random_layout(objective: Objective, spec: ModelSpec, length: int) -> Layout:
    """The objective's layout, of a vocabulary without text."""
    return objective.layout(Vocabulary.invented(spec.vocab, objective.special_tokens), spec, length)


def _stacked(layout: Layout, rows: Sequence[Sequence[Piece]], rng: np.random.Generator) -> Row:
    def other(rng: np.random.Generator) -> np.ndarray | None:
        pieces = rows[int(rng.integers(len(rows)))]
        return pieces[int(rng.integers(len(pieces)))].body

    made = [layout.row(pieces, rng, other) for pieces in rows]
    return {key: np.stack([row[key] for row in made]) for key in made[0]}


def _longest(rng: np.random.Generator, layout: Layout, vocab: int) -> Piece:
    if layout.whole is None:
        return Piece(rng.integers(0, vocab, len(layout.rooms), np.int32))
    size = 1
    while layout.whole.room(np.array([size + 1]), np.array([size + 1])) <= layout.length:
        size += 1
    return _example(rng, layout, vocab, size)


def _example(rng: np.random.Generator, layout: Layout, vocab: int, size: int) -> Piece:
    """A random pair, or a labelled example of two texts of ``size`` tokens each."""
    source, target = rng.integers(0, vocab, (2, size), np.int32)
    one_text = layout.kinds[0] in ("tags", "chats")
    return Piece(source, target=target[:0] if one_text else target, labels=layout.invented_labels(rng, size))


def _pieces(rng: np.random.Generator, layout: Layout, vocab: int) -> list[Piece]:
    """Pieces of random lengths that fill half of a row at least, and most rows not wholly."""
    left, pieces = int(rng.integers(-(-layout.length // 2) + 1, layout.length + 1)), list[Piece]()
    for _ in range(4):
        piece, room = _fitting(rng, layout, vocab, left if len(pieces) == 3 else int(rng.integers(left // 4, left + 1)))
        if piece is not None:
            pieces.append(piece)
            left -= room
    return pieces


def _fitting(rng: np.random.Generator, layout: Layout, vocab: int, room: int) -> tuple[Piece | None, int]:
    """A piece that takes at most ``room`` positions, and what it takes; None if there is none."""
    if layout.whole is not None:
        sizes = np.arange(1, layout.length)
        rooms = layout.whole.room(sizes, sizes)
        count = int((rooms <= room).sum())
        return (_example(rng, layout, vocab, count), int(rooms[count - 1])) if count else (None, 0)
    count = int(np.searchsorted(layout.rooms, room, side="right")) - 1
    return (Piece(rng.integers(0, vocab, count + 1, np.int32)), int(layout.rooms[count])) if count else (None, 0)
