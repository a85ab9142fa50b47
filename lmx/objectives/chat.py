"""Fine-tuning on conversations: next tokens, of which only the model's own turns are learned (Ouyang et al. 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lmx.data.layout import Labels, Layout, Other, Piece, Row, Whole, empty_row
from lmx.models.specs import ModelSpec
from lmx.objectives.next_token import NextToken
from lmx.objectives.vocabulary import Vocabulary

Turns = Literal["all", "last"]


@dataclass(frozen=True)
class ChatSft(NextToken):
    """Cross-entropy of the assistant's words in conversations that the tokenizer's chat template writes out."""

    turns: Turns = "all"
    """Which of the assistant's turns are learned: all of them, or the last of each conversation; either way without
    those that have "train": false or "weight": 0 in the data."""
    longer: Literal["truncate", "drop"] = "truncate"
    """What becomes of conversations that take more than a row: their ends are cut, and those that then hold nothing to
    learn are left out; or all of them are left out. Either is counted."""

    def layout(self, vocabulary: Vocabulary, spec: ModelSpec, length: int) -> Layout:
        """Rows of conversations."""
        return ChatRows(length, self.turns, self.longer)


@dataclass(frozen=True)
class ChatRows(Layout):
    """The arrays of next tokens, and ``target_segments``, int32 [length]: the segment where the target is learned, else
    0."""

    turns: Turns
    longer: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """Chats."""
        return ("chats",)

    @property
    def whole(self) -> Whole | None:
        """Every token is read but the last, which is only predicted."""
        return Whole(lambda first, second: np.maximum(np.asarray(first) - 1, 1), self.longer)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What becomes of the longer ones, and what is learned."""
        return ("chats", self.longer, self.turns)

    def taught(self, examples: np.ndarray, labels: Labels) -> np.ndarray:
        """Whether a token that is learned is in the row."""
        return np.array([self._learned(labels(int(i)))[1 : self.length + 1].any() for i in examples], bool)

    def empty(self) -> Row:
        """All zero."""
        return empty_row(self.length) | {"target_segments": np.zeros(self.length, np.int32)}

    def row(self, pieces: Sequence[Piece], rng: np.random.Generator, other: Other) -> Row:
        """Each conversation on its own."""
        row, at = self.empty(), 0
        for segment, piece in enumerate(pieces, start=1):
            assert piece.labels is not None, "the documents have no labels"
            tokens = piece.tokens[: self.length + 1]
            place = slice(at, at + len(tokens) - 1)
            row["tokens"][place], row["targets"][place] = tokens[:-1], tokens[1:]
            row["segment_ids"][place], row["positions"][place] = segment, np.arange(len(tokens) - 1)
            row["target_segments"][place] = segment * self._learned(piece.labels)[1 : len(tokens)]
            at = place.stop
        return row

    def _learned(self, labels: np.ndarray) -> np.ndarray:
        """Which tokens of a conversation are learned, bool [tokens]."""
        return labels == labels.max(initial=1) if self.turns == "last" else labels > 0

    def invented_labels(self, rng: np.random.Generator, count: int) -> np.ndarray | None:
        """Turns at random places, the last token among them."""
        labels = rng.integers(0, 2, count, np.int32) * rng.integers(1, 3, count, np.int32)
        labels[-1:] = 2
        return labels
