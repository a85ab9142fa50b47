"""What a masked language model reads: a piece of text, or two sentences, to tell how they belong together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmx.data.framing import Frames
from lmx.data.layout import Other, Piece
from lmx.data.tokenizer import CLS, SEP


class Text(NamedTuple):
    """Tokens int [n], their types int [n] (1 in the second sentence), what may be masked bool [n], and the answer: 0
    for none, 1 for a pair as it stands in a document, 2 for any other."""

    tokens: np.ndarray
    types: np.ndarray
    maskable: np.ndarray
    answer: int = 0


@dataclass(frozen=True)
class Sentences:
    """Base class, and what there is without a question: a piece of a document as a text is read by itself."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens that it needs."""
        return ()

    @property
    def asks(self) -> bool:
        """Whether there is a question."""
        return bool(self.special_tokens)

    def extra(self, frames: Frames) -> int:
        """Special tokens around a piece at the most."""
        return frames.single.extra

    def text(self, piece: Piece, frames: Frames, rng: np.random.Generator, other: Other) -> Text:
        """What stands for a piece."""
        return framed(frames, [piece.body])


@dataclass(frozen=True)
class SentenceOrder(Sentences):
    """Pairs of neighbours, half of them exchanged (Lan et al. 2019, ALBERT, 3.1), as the tokenizer frames pairs:
    ``[CLS] a [SEP] b [SEP]``.

    A piece is cut between a quarter and three quarters of it, so that both parts are long enough to tell.
    """

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """What stands before the pair, and after each part."""
        return CLS, SEP

    def extra(self, frames: Frames) -> int:
        """Those around a pair."""
        return max(frames.of_pairs().extra, frames.single.extra)

    def text(self, piece: Piece, frames: Frames, rng: np.random.Generator, other: Other) -> Text:
        """A pair; a piece of a single token has no second part and no question."""
        body = piece.body
        if len(body) < 2:
            return framed(frames, [body])
        low, high = max(1, len(body) // 4), max(1, 3 * len(body) // 4)
        cut = int(rng.integers(low, high + 1))
        first, second, answer = self.pair(body[:cut], body[cut:], rng, other)
        return framed(frames, [first, second], answer)

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


def framed(frames: Frames, parts: Sequence[np.ndarray], answer: int = 0) -> Text:
    """One or two parts in their frame; all of them may be masked, and nothing of the frame."""
    frame = frames.single if len(parts) == 1 else frames.of_pairs()
    tokens, types, starts = frame.around(parts)
    maskable = np.zeros(len(tokens), bool)
    for start, part in zip(starts, parts, strict=True):
        maskable[start : start + len(part)] = True
    return Text(tokens, types, maskable, answer)
