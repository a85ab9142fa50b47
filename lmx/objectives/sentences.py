"""What a masked language model reads: a piece of text, or two sentences, to tell how they belong together."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmx.data.layout import Other, Piece
from lmx.objectives.vocabulary import Vocabulary


class Text(NamedTuple):
    """Tokens int [n], their types int [n] (1 in the second sentence), what may be masked bool [n], and the answer: 0
    for none, 1 for a pair as it stands in a document, 2 for any other."""

    tokens: np.ndarray
    types: np.ndarray
    maskable: np.ndarray
    answer: int = 0


@dataclass(frozen=True)
class Sentences:
    """Base class, and what there is without a question: a piece of a document, the end token before its first."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens that it needs."""
        return ()

    @property
    def asks(self) -> bool:
        """Whether there is a question."""
        return bool(self.special_tokens)

    @property
    def extra(self) -> int:
        """Positions that a piece takes beside its predictions."""
        return 0

    def text(self, piece: Piece, vocabulary: Vocabulary, rng: np.random.Generator, other: Other) -> Text:
        """What stands for a piece."""
        tokens = piece.tokens[:-1]
        maskable = np.arange(len(tokens)) >= int(piece.first)
        return Text(tokens, np.zeros_like(tokens), maskable)


@dataclass(frozen=True)
class SentenceOrder(Sentences):
    """Pairs of neighbours, half of them exchanged (Lan et al. 2019, ALBERT, 3.1): ``[CLS] a [SEP] b [SEP]``.

    A piece is cut between a quarter and three quarters of it, so that both parts are long enough to tell.
    """

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """What stands before the pair, and after each part."""
        return "[CLS]", "[SEP]"

    @property
    def extra(self) -> int:
        """The three special tokens."""
        return 3

    def text(self, piece: Piece, vocabulary: Vocabulary, rng: np.random.Generator, other: Other) -> Text:
        """A pair; a piece of a single token has no second part and no question."""
        body = piece.body
        if len(body) < 2:
            return joined(body, body[:0], 0, vocabulary)
        low, high = max(1, len(body) // 4), max(1, 3 * len(body) // 4)
        cut = int(rng.integers(low, high + 1))
        return joined(*self.pair(body[:cut], body[cut:], rng, other), vocabulary)

    def pair(
        self, first: np.ndarray, second: np.ndarray, rng: np.random.Generator, other: Other
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """The two parts as they are asked about, and the answer (see :class:`Text`)."""
        return (second, first, 2) if rng.random() < 0.5 else (first, second, 1)


@dataclass(frozen=True)
class NextSentence(SentenceOrder):
    """Pairs of which half have a second part from another document (Devlin et al. 2018, 3.1, task 2)."""

    def pair(
        self, first: np.ndarray, second: np.ndarray, rng: np.random.Generator, other: Other
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """See :class:`SentenceOrder`; where there is no other document, the pair is as it stands."""
        found = other(rng) if rng.random() < 0.5 else None
        if found is None or not len(found):
            return first, second, 1
        start = int(rng.integers(max(1, len(found) - len(second) + 1)))
        return first, found[start : start + len(second)], 2


def joined(first: np.ndarray, second: np.ndarray, answer: int, vocabulary: Vocabulary) -> Text:
    """``[CLS] first [SEP] second [SEP]``; ``[CLS] first [SEP]`` if the second is empty."""
    start, end = vocabulary.special["[CLS]"], vocabulary.special["[SEP]"]
    one, two = np.array([start], np.int32), np.array([end], np.int32)
    parts = [one, first, two, *([second, two] if len(second) else [])]
    tokens = np.concatenate(parts).astype(np.int32)
    types = (np.arange(len(tokens)) > len(first) + 1).astype(np.int32)
    text = np.concatenate([np.full(len(part), index % 2 == 1) for index, part in enumerate(parts)])
    return Text(tokens, types, text, answer)
