"""Fill in the middle (Bavarian et al. 2022): next tokens of documents whose middle was moved to their end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from lmx.config import SHARE
from lmx.data.layout import Layout, Other, Piece, Row, empty_row, predicted
from lmx.models.specs import ModelSpec
from lmx.objectives.next_token import NextToken
from lmx.objectives.vocabulary import Vocabulary

PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"


@dataclass(frozen=True)
class FillInTheMiddle(NextToken):
    """Next-token prediction, of which some documents come as prefix, suffix and then middle.

    The cuts lie between tokens. Bavarian et al. 2022 cut between characters, because a model that
    has seen cuts between tokens alone fails where a cursor stands inside of one. Here the rows are planned by tokens
    that are stored once: cut text would have to be tokenized again, and take more room than it was planned with.
    """

    rate: Annotated[float, SHARE] = 0.5
    """Share of the pieces of documents that are rearranged."""
    suffix_first: Annotated[float, SHARE] = 0.5
    """Share of those whose suffix comes first (SPM), so that prefix and middle stand together; else PSM."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """What stands before each part."""
        return PREFIX, SUFFIX, MIDDLE

    def layout(self, vocabulary: Vocabulary, spec: ModelSpec, length: int) -> Layout:
        """Rows of next tokens, some of them rearranged."""
        return MiddleRows(length, self, vocabulary)


@dataclass(frozen=True)
class MiddleRows(Layout):
    """The arrays of next-token prediction."""

    objective: FillInTheMiddle
    vocabulary: Vocabulary

    def room(self, count: int) -> int:
        """The predictions, the three special tokens, and an end where the document goes on."""
        return count + 4

    def empty(self) -> Row:
        """All zero."""
        return empty_row(self.length)

    def row(self, pieces: Sequence[Piece], rng: np.random.Generator, other: Other) -> Row:
        """Each piece as it is or rearranged."""
        streams = [self._moved(p.body, rng) if rng.random() < self.objective.rate else p.tokens for p in pieces]
        return predicted(self.length, streams)

    def _moved(self, text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``PRE prefix SUF suffix MID middle``, or ``PRE SUF suffix MID prefix middle`` (appendix D), between ends; the
        cuts are uniform over the places between tokens, either end included."""
        first, second = np.sort(rng.integers(0, len(text) + 1, 2))
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        special = [self.vocabulary.special[name] for name in (PREFIX, SUFFIX, MIDDLE)]
        pre, suf, mid, end = np.array([*special, self.vocabulary.end], np.int32)[:, None]
        if rng.random() < self.objective.suffix_first:
            parts = [end, pre, suf, suffix, mid, prefix, middle, end]
        else:
            parts = [end, pre, prefix, suf, suffix, mid, middle, end]
        return np.concatenate(parts).astype(np.int32)
