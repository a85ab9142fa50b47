"""Questions about a text that are answered with a stretch of it, or in words (SQuAD, Rajpurkar et al. 2016, 2018)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmx.data.tokenizer import TextTokenizer
from lmx.eval.metrics.text import answers as squad
from lmx.eval.tables import Example, listed
from lmx.eval.tasks.classify import head_scores
from lmx.eval.tasks.generation import written
from lmx.eval.tasks.stretches import Question, Stretch, Window, Windows
from lmx.eval.tasks.task import Examinee, Outcome, Prompted, Template, value


class Answered(NamedTuple):
    """The answers (None: the example is left out), how many questions or prompts were cut, and what is to be told."""

    texts: list[str | None]
    truncated: int
    notes: Mapping[str, str]


@dataclass(frozen=True)
class ExtractiveQa(Prompted):
    """The answer to ``question`` in ``context``; exact match and F1 as SQuAD has them.

    A model whose head finds stretches is asked for the best one, in the context's own characters, or for none; another
    reads ``prompt`` and writes the answer. The head reads a long context in windows that overlap, as in training; too
    long is then a question that leaves them no room. Files may be SQuAD's own JSON (its ``answers`` are then a column
    of texts).
    """

    prompt: Template = "{context}\n\nQuestion: {question}\nAnswer:"
    """What a model that writes reads."""
    question: str | Callable[[Example], Any] = "question"
    """A column or a function."""
    context: str | Callable[[Example], Any] = "context"
    """A column or a function."""
    answers: str | Callable[[Example], Any] = "answers"
    """A column or a function: a list of texts, SQuAD's {"text": [...]}, or one text; empty where there is no answer."""
    max_answer_tokens: int = 30
    """The longest answer."""
    overlap: int = 64
    """Tokens that a window of a long context shares with the one before it."""
    null_threshold: float = 0.0
    """The head's answer is none where the score of that exceeds the best stretch's by more than this (Devlin et al.
    2018, 4.3); a large number has it always answer."""
    stop: tuple[str, ...] = ("\n",)
    """Strings that end an answer that is written."""

    def run(self, examinee: Examinee) -> Outcome:
        """See :class:`Task`."""
        rows = self.examples()
        expected = [self._answers(row) for row in rows]
        by_head = any(head.outputs == 2 and head.name == "span" for head in examinee.model.spec.tasks)
        texts, truncated, notes = (self._found if by_head else self._written)(examinee, rows)
        kept = [i for i, text in enumerate(texts) if text is not None]
        measures, _ = squad([str(texts[i]) for i in kept], [expected[i] for i in kept])
        return Outcome(len(kept), measures, notes, truncated, len(rows) - len(kept))

    def answer_text(self, row: Example) -> str:
        """The first of the right answers."""
        return next(iter(self._answers(row)), "")

    def rows(self, content: Any) -> Iterator[Example]:
        """The questions of SQuAD's JSON, or the rows of any other."""
        data = content.get("data", []) if isinstance(content, dict) else []
        if not any("paragraphs" in article for article in data):
            yield from listed(content)
        for article in data:
            for paragraph in article.get("paragraphs", ()):
                for asked in paragraph["qas"]:
                    texts = [answer["text"] for answer in asked.get("answers", ())]
                    yield {**asked, "context": paragraph["context"], "answers": texts}

    def _answers(self, row: Example) -> list[str]:
        found = value(self.answers, row)
        found = found["text"] if isinstance(found, dict) and "text" in found else found
        return [found] if isinstance(found, str) else [str(text) for text in found or ()]

    def _written(self, examinee: Examinee, rows: Sequence[Example]) -> Answered:
        texts, truncated = written(
            examinee, self.contexts(rows), new_tokens=self.max_answer_tokens, stop=self.stop, keeps=self.keeps
        )
        return Answered(texts, truncated, {"by": "generation"})

    def _found(self, examinee: Examinee, rows: Sequence[Example]) -> Answered:
        windows, truncated = self._windows(examinee, rows)
        found: dict[int, list[Stretch]] = {}
        scores = head_scores(examinee, [window.text for window in windows])
        for window, own in zip(windows, scores, strict=True):
            found.setdefault(window.question.number, []).append(window.best(own, self.max_answer_tokens))
        texts = [self._best(found[i]) if i in found else None for i in range(len(rows))]
        several = sum(len(own) > 1 for own in found.values())
        told = f"{several} of {len(found)} contexts took several, which share {self.overlap} tokens"
        return Answered(texts, truncated, {"by": "the span head", "windows": told})

    def _windows(self, examinee: Examinee, rows: Sequence[Example]) -> tuple[list[Window], int]:
        """Those of all examples that are kept, and how many questions lost their end."""
        cutter = Windows.of(examinee, self.overlap)
        questions = self._questions(examinee.tokenizer, rows)
        cuts = [cutter.excess(question) for question in questions]
        kept = [question for question, cut in zip(questions, cuts, strict=True) if self.keeps(cut, question.number)]
        whole = [cutter.shortened(question) if cuts[question.number] else question for question in kept]
        windows = [window for question in whole for window in cutter.windows(question)]
        return windows, sum(cuts[question.number] > 0 for question in kept)

    def _questions(self, tokenizer: TextTokenizer, rows: Sequence[Example]) -> list[Question]:
        contexts = [str(value(self.context, row)) for row in rows]
        asked = tokenizer.encode_batch([str(value(self.question, row)) for row in rows])
        parts = zip(range(len(rows)), asked, contexts, tokenizer.encode_spans(contexts), strict=True)
        return [Question(*part) for part in parts]

    def _best(self, stretches: Sequence[Stretch]) -> str:
        """The best of all windows'; nothing where even the window that is least sure of it says that there is none."""
        best, none = max(stretches, key=lambda own: own.score), min(own.none for own in stretches)
        return "" if none - best.score > self.null_threshold else best.text
