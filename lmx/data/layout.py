"""Layouts: how the pieces of documents that share a row become the arrays that an objective trains on.

A layout tells the packing plan what a piece takes of a row, and makes the row. All that it draws comes from a generator
seeded by the run's seed, the source, the epoch and the row, so that the row is the same whichever process reads it.
"""

import abc
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lmx.errors import UserError

Row = dict[str, np.ndarray]
Labels = Callable[[int], np.ndarray]
"""(the number of an example) -> its labels [any]."""
KEYS = ("tokens", "targets", "segment_ids", "positions")


class Piece(NamedTuple):
    """A piece of a document that has a place in a row.

    ``tokens`` are int32 [count + 1] of the document's stream, which has an end token before and after the text;
    ``first`` and ``last`` say whether those two are among them.

    Where documents are pairs or other examples, ``tokens`` are those of the example from token ``start`` on, without
    ends, ``target`` those of its target or second text [any], and ``labels`` all that there is to learn of it [any], as
    :mod:`lmx.data.encoders` says.
    """

    tokens: np.ndarray
    document: int = 0
    first: bool = True
    last: bool = True
    target: np.ndarray | None = None
    labels: np.ndarray | None = None
    start: int = 0

    @property
    def body(self) -> np.ndarray:
        """The text's tokens that are predicted in this piece: the bodies of a document's pieces are its text."""
        return self.tokens[1 : len(self.tokens) - int(self.last)]


Other = Callable[[np.random.Generator], np.ndarray | None]
"""Draws the body of a piece of another document of the same source; None if there is no other."""


@dataclass(frozen=True)
class Layout(abc.ABC):
    """Base class. ``length`` is the room in a row: positions, of the encoder's where there are two stacks."""

    length: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of documents that it takes, as :data:`lmx.data.documents.Kind` names them."""
        return ("texts",)

    @abc.abstractmethod
    def empty(self) -> Row:
        """A row that holds nothing, int32 arrays, all zero: it says which arrays a row has and how long they are."""

    @abc.abstractmethod
    def row(self, pieces: Sequence[Piece], rng: np.random.Generator, other: Other) -> Row:
        """The row of these pieces."""

    def room(self, count: int) -> int:
        """What a piece of ``count`` predictions takes of a row at the most, in positions."""
        return count

    @property
    def whole(self) -> "Whole | None":
        """Where documents are pairs or other examples, which are not cut as a text may be: what they take of a row."""
        return None

    def check_examples(self, name: str, classes: Sequence[str], counts: np.ndarray) -> None:  # noqa: B027
        """Raises UserError if it cannot learn from the examples of the source ``name``.

        Args:
          name: of the source, for people.
          classes: the names of the classes, of examples that have such.
          counts: int [examples], how many labels each has.
        """

    def invented_labels(self, rng: np.random.Generator, count: int) -> np.ndarray | None:
        """Random labels of an example of ``count`` tokens, for checks; None where examples have none."""
        return None

    def taught(self, examples: np.ndarray, labels: Labels) -> np.ndarray:
        """Of examples that are truncated to a row, int [any] numbers: whether there is something left to learn of each,
        bool [any]."""
        return np.ones(len(examples), bool)

    @functools.cached_property
    def rooms(self) -> np.ndarray:
        """int64 [longest + 1]: the room of every piece that fits a row, by its predictions; it never falls.

        Raises:
          UserError: not even one token fits.
        """
        rooms = [0]
        while (room := max(rooms[-1], self.room(len(rooms)))) <= self.length:
            rooms.append(room)
        if len(rooms) == 1:
            raise UserError(f"a row of {self.length} positions has no room for a single token: raise train.length")
        return np.array(rooms, np.int64)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a packing plan depends on beside the length; () where pieces take a position for each prediction."""
        return () if self.length + 1 == len(self.rooms) else tuple(self.rooms.tolist())


@dataclass(frozen=True)
class Whole:
    """What examples take of a row: (int [examples] tokens, int [examples] tokens of the target or second text) -> int
    [examples] positions, more for more tokens.

    ``longer`` says what becomes of one that takes more than a row: "truncate" (the layout cuts it), "drop" (it is left
    out), or "split": it becomes several, with windows of its tokens that share ``overlap`` tokens with the one before;
    one whose second text leaves no more room than that is left out.
    """

    room: Callable[[np.ndarray, np.ndarray], np.ndarray]
    longer: str
    overlap: int = 0


@dataclass(frozen=True)
class NextTokens(Layout):
    """int32 [length] each: ``tokens``; ``targets``, the token after each; ``segment_ids``, 1 for the first piece in the
    row, 2 for the second, 0 for padding; ``positions``, counted from 0 within each piece."""

    def empty(self) -> Row:
        """All zero."""
        return empty_row(self.length)

    def row(self, pieces: Sequence[Piece], rng: np.random.Generator, other: Other) -> Row:
        """Every token of the pieces, in order."""
        return predicted(self.length, [piece.tokens for piece in pieces])


def empty_row(length: int) -> Row:
    """A row of next-token arrays that holds nothing: all zero."""
    return {key: np.zeros(length, np.int32) for key in KEYS}


def predicted(length: int, streams: Sequence[np.ndarray]) -> Row:
    """A row that predicts each token of the streams from those before it; a stream takes one position less than it
    has tokens."""
    row, at = empty_row(length), 0
    for segment, stream in enumerate(streams, start=1):
        place = slice(at, at + len(stream) - 1)
        row["tokens"][place], row["targets"][place] = stream[:-1], stream[1:]
        row["segment_ids"][place] = segment
        row["positions"][place] = np.arange(len(stream) - 1)
        at += len(stream) - 1
    return row
