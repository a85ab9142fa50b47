"""The stretches of a text by which a head answers questions: the windows that it reads, and the best stretch of one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmx.data.framing import Frames
from lmx.data.layout import Piece
from lmx.data.packing import windows_of
from lmx.data.tokenizer import Encoded, Spanned
from lmx.errors import UserError
from lmx.eval.tasks.task import Examinee
from lmx.objectives.span_answers import AnswerRows


class Stretch(NamedTuple):
    """The best stretch of a window: its score, that of none (which the first token stands for), and its text."""

    score: float
    none: float
    text: str


class Question(NamedTuple):
    """One with its number, its tokens, its context, and the tokens of that."""

    number: int
    tokens: Sequence[int]
    context: str
    spanned: Spanned


@dataclass(frozen=True)
class Window:
    """A question and a part of its context, as a model reads them.

    Attributes:
      question: whose it is.
      text: all tokens that are read.
      first: where the context's begin among them.
      spans: the characters of the context [start, end) that each of its tokens in the window stands for.
    """

    question: Question
    text: Encoded
    first: int
    spans: Sequence[tuple[int, int]]

    def best(self, scores: np.ndarray, longest: int) -> Stretch:
        """The best stretch of at most ``longest`` tokens, given the head's scores float32 [length, 2]."""
        score, start, end = best_span(scores[self.first : self.first + len(self.spans)], longest)
        text = self.question.context[self.spans[start][0] : self.spans[end - 1][1]] if end else ""
        return Stretch(score, float(scores[0].sum()), text.strip())


@dataclass(frozen=True)
class Windows:
    """Cuts contexts into windows as training does: those of ``rows``, with ``room`` tokens for question and context."""

    rows: AnswerRows
    room: int

    @classmethod
    def of(cls, examinee: Examinee, overlap: int) -> "Windows":
        """As long as the rows of the model's run, or as its context; they share ``overlap`` tokens.

        Raises:
          UserError: they have no room for that, or the tokenizer reads single texts.
        """
        model, frames = examinee.model, Frames.of(examinee.tokenizer)
        length = model.experiment.train.length if model.experiment else model.spec.context
        room = length - frames.of_pairs().extra
        if not 0 <= overlap < room - 1:
            raise UserError(
                f"the task's overlap is {overlap}, expected 0 to below {room - 1}: a window of {length} tokens has a "
                "question too"
            )
        return cls(AnswerRows(length, frames, False, None, 2, "split", overlap), room)

    def excess(self, question: Question) -> int:
        """By how many tokens a question is too long: it must leave the windows more room than they share."""
        asked = len(question.tokens)
        return max(0, asked + self.rows.overlap + 1 - self.room) if asked + len(question.spanned.ids) > self.room else 0

    def shortened(self, question: Question) -> Question:
        """One that is too long without its end, so that the windows have room to advance."""
        return question._replace(tokens=question.tokens[: (self.room - self.rows.overlap) // 2])

    def windows(self, question: Question) -> list[Window]:
        """Those of one question."""
        whole = self.rows.whole
        assert whole is not None
        ours, theirs = (np.array([len(ids)]) for ids in (question.spanned.ids, question.tokens))
        pieces, _, _ = windows_of(np.array([question.number]), ours, theirs, self.rows.length, whole)
        return [self._window(question, slice(start, start + count)) for _, start, count in pieces.tolist()]

    def _window(self, question: Question, place: slice) -> Window:
        ids, spans = question.spanned.ids[place], question.spanned.spans[place]
        framed = self.rows.framed(Piece(np.array(ids, np.int32), target=np.array(question.tokens, np.int32)))
        return Window(question, Encoded(framed.tokens.tolist(), framed.types.tolist()), framed.starts[-1], spans)


def best_span(scores: np.ndarray, longest: int) -> tuple[float, int, int]:
    """The stretch with the highest sum of its start's and its end's score.

    Args:
      scores: float [length, 2] for start and end.
      longest: tokens that it has at most, at least 1.

    Returns:
      The sum, its first token, and the one after its last; (-inf, 0, 0) of no tokens.
    """
    if not len(scores):
        return -np.inf, 0, 0
    far = np.arange(len(scores))[None, :] - np.arange(len(scores))[:, None]
    sums = np.where((far >= 0) & (far < longest), scores[:, :1] + scores[:, 1], -np.inf)
    start, end = divmod(int(np.argmax(sums)), len(scores))
    return float(sums[start, end]), start, end + 1
