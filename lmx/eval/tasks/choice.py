"""Multiple choice: the answer is the likeliest continuation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmx.errors import UserError
from lmx.eval.asking import Likelihood
from lmx.eval.metrics.measure import mean
from lmx.eval.tables import Example
from lmx.eval.tasks.task import Examinee, Outcome, Prompted, value

Choices = tuple[str, ...] | str | Callable[[Example], Sequence[str]]
WAYS = ("accuracy", "accuracy_per_byte", "accuracy_per_token", "accuracy_unconditional")


@dataclass(frozen=True)
class MultipleChoice(Prompted):
    """The answer is the choice with the highest likelihood after the prompt.

    Four ways to compare, each an accuracy: the log-probability as it is (``accuracy``), divided by the choice's bytes
    (``accuracy_per_byte``) or tokens (``accuracy_per_token``), and less the log-probability of the choice after
    ``unconditional`` alone (``accuracy_unconditional``; Brown et al. 2020, 2.4).
    """

    choices: Choices = ()
    """The choices, if they are the same for all examples; or a column that has them, or a function of an example."""
    answer: str | Callable[[Example], Any] = "answer"
    """A column or a function: the number of the right choice, or its text."""
    unconditional: str = "Answer:"
    """A prompt that says nothing of the question."""

    def run(self, examinee: Examinee) -> Outcome:
        """See :class:`Task`."""
        rows = self.examples()
        asked = self.asked(examinee, rows, self._choices)
        scores = asked.scores(examinee)
        kept = [rows[i] for i in asked.kept]
        texts = [self._choices(row) for row in kept]
        hits: dict[str, list[bool]] = {}
        for row, own, choices, alone in zip(kept, scores, texts, self._alone(examinee, texts), strict=True):
            for name, best in _best(own, choices, alone).items():
                hits.setdefault(name, []).append(best == self._answer(row))
        measures = {name: mean(hits.get(name, []), name) for name in WAYS}
        note = {"accuracy_unconditional": f"less the log-probability after {self.unconditional!r}"}
        return Outcome(len(kept), measures, note, asked.truncated, len(rows) - len(kept))

    def answer_text(self, row: Example) -> str:
        """The right choice."""
        return self._choices(row)[self._answer(row)]

    def _alone(self, examinee: Examinee, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """The log-probability of each choice after ``unconditional``; the same choice is asked about once."""
        different = list(dict.fromkeys(choice for own in texts for choice in own))
        pairs = [examinee.asking.pair(self.unconditional, self.delimiter + choice) for choice in different]
        found = {c: score.logprob for c, score in zip(different, examinee.likelihoods(pairs), strict=True)}
        return [[found[choice] for choice in own] for own in texts]

    def _choices(self, row: Example) -> list[str]:
        found = self.choices if isinstance(self.choices, tuple) else value(self.choices, row)
        if isinstance(found, str) or len(found) < 2:
            raise UserError(f"an example's choices are {found!r}; expected at least two texts")
        return [str(choice) for choice in found]

    def _answer(self, row: Example) -> int:
        return chosen(value(self.answer, row), self._choices(row))


def _best(scores: Sequence[Likelihood], choices: Sequence[str], alone: Sequence[float]) -> dict[str, int]:
    raw = np.array([score.logprob for score in scores])
    sizes = np.array([max(len(choice.encode()), 1) for choice in choices])
    tokens = np.array([score.tokens for score in scores])
    compared = (raw, raw / sizes, raw / tokens, raw - np.array(alone))
    return {name: int(values.argmax()) for name, values in zip(WAYS, compared, strict=True)}


def chosen(answer: Any, choices: Sequence[str]) -> int:
    """The number of an answer that is one of the choices, or their number (from 0), also as digits.

    Raises:
      UserError: it is neither.
    """
    if str(answer) in choices and type(answer) is not int:
        return list(choices).index(str(answer))
    try:
        number = int(answer)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < len(choices):
        raise UserError(f"the answer {answer!r} is none of the choices {list(choices)!r}, nor the number of one")
    return number
