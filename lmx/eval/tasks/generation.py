"""Tasks that are answered with a text that the model writes, or with a stretch of a text that it reads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lmx.errors import UserError
from lmx.eval.likelihood import batches, bucket
from lmx.eval.metrics.text import TEXT_METRICS
from lmx.eval.metrics.text import answers as squad
from lmx.eval.tables import Example, listed, read_lines
from lmx.eval.tasks.classify import ended, head_scores
from lmx.eval.tasks.task import Examinee, Outcome, Prompted, Template, value

Metric = Literal["bleu", "chrf", "rouge", "exact_match", "squad"]
REFERENCE = "reference"
"""The column that the lines of ``reference_files`` become."""


@dataclass(frozen=True)
class Generation(Prompted):
    """What the model writes after the prompt, against one or more references; the likeliest token each time."""

    references: str | Callable[[Example], Any] = REFERENCE
    """A column or a function: a text, or a list of them."""
    reference_files: tuple[str, ...] = ()
    """Text files whose line i is the reference of line i of ``files``."""
    metrics: tuple[Metric, ...] = ("exact_match",)
    """What is measured: bleu, chrf, rouge, exact_match (nothing but blanks around is normalised), squad (exact match
    and F1 of words as SQuAD normalises them)."""
    max_new_tokens: int = 64
    """The longest answer."""
    stop: tuple[str, ...] = ("\n",)
    """Strings that end an answer."""

    def run(self, examinee: Examinee) -> Outcome:
        """See :class:`Task`."""
        unknown = [name for name in self.metrics if name not in TEXT_METRICS]
        if unknown or not self.metrics:
            raise UserError(f"metrics is {self.metrics!r}, expected some of {', '.join(TEXT_METRICS)}")
        rows = self.examples()
        expected = [self._references(row) for row in rows]
        contexts = self.contexts(rows)
        texts, truncated = written(examinee, contexts, new_tokens=self.max_new_tokens, stop=self.stop, keeps=self.keeps)
        kept = [i for i, text in enumerate(texts) if text is not None]
        answers = [str(texts[i]).strip() for i in kept]
        found = [TEXT_METRICS[name](answers, [expected[i] for i in kept]) for name in self.metrics]
        measures, notes = ({k: v for part in parts for k, v in part.items()} for parts in zip(*found, strict=True))
        return Outcome(len(kept), measures, notes, truncated, len(rows) - len(kept))

    def answer_text(self, row: Example) -> str:
        """The first reference."""
        return self._references(row)[0]

    def _references(self, row: Example) -> list[str]:
        found = value(self.references, row)
        texts = [found] if isinstance(found, str) else list(found or ())
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"an example's references are {found!r}, expected a text or a list of them")
        return texts

    def joined(self, rows: list[Example]) -> list[Example]:
        """The rows with the lines of ``reference_files``, if there are any.

        Raises:
          UserError: there are not as many lines as rows.
        """
        if not self.reference_files:
            return rows
        lines = read_lines(self.reference_files)
        if len(lines) != len(rows):
            raise UserError(
                f"{', '.join(self.reference_files)} has {len(lines)} lines, but there are {len(rows)} examples: line i "
                "must be the reference of example i"
            )
        return [{**row, REFERENCE: line} for row, line in zip(rows, lines, strict=True)]


@dataclass(frozen=True)
class ExtractiveQa(Prompted):
    """The answer to ``question`` in ``context``; exact match and F1 as SQuAD has them (Rajpurkar et al. 2016).

    A model whose head finds stretches is asked for the best one; another reads ``prompt`` and writes the answer. Files
    may be SQuAD's own JSON (its ``answers`` are then a column of texts).
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
    stop: tuple[str, ...] = ("\n",)
    """Strings that end an answer that is written."""

    def run(self, examinee: Examinee) -> Outcome:
        """See :class:`Task`."""
        rows = self.examples()
        expected = [self._answers(row) for row in rows]
        spans = [head for head in examinee.model.spec.tasks if head.outputs == 2 and head.name == "span"]
        if spans:
            texts, truncated = self._found(examinee, rows)
        else:
            contexts = self.contexts(rows)
            texts, truncated = written(
                examinee, contexts, new_tokens=self.max_answer_tokens, stop=self.stop, keeps=self.keeps
            )
        kept = [i for i, text in enumerate(texts) if text is not None]
        measures, _ = squad([str(texts[i]) for i in kept], [expected[i] for i in kept])
        note = {"by": "the span head" if spans else "generation"}
        return Outcome(len(kept), measures, note, truncated, len(rows) - len(kept))

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

    def _found(self, examinee: Examinee, rows: Sequence[Example]) -> tuple[list[str | None], int]:
        """For each example the best stretch of its context, and how many contexts lost their end."""
        questions = [str(value(self.question, row)) for row in rows]
        room, tokenizer = examinee.model.spec.context, examinee.tokenizer
        alone = [len(e.ids) for e in examinee.model.tokenize(questions)]
        pairs = list(zip(questions, (str(value(self.context, row)) for row in rows), strict=True))
        encoded = examinee.model.tokenize(pairs)
        cuts = [max(0, len(text.ids) - room) for text in encoded]
        kept = [i for i, cut in enumerate(cuts) if self.keeps(cut, i)]
        texts = [ended(encoded[i], room) for i in kept]
        special, answers = tokenizer.token_bytes() == 0, list[str | None]([None] * len(rows))
        for i, text, scores in zip(kept, texts, head_scores(examinee, texts), strict=True):
            allowed = np.array([at >= alone[i] and not special[token] for at, token in enumerate(text.ids)])
            start, end = best_span(scores[: len(text.ids)], allowed, self.max_answer_tokens)
            answers[i] = tokenizer.decode(text.ids[start:end]).strip()
        return answers, sum(cuts[i] > 0 for i in kept)


def best_span(scores: np.ndarray, allowed: np.ndarray, longest: int) -> tuple[int, int]:
    """The stretch with the highest sum of its start's and its end's score.

    Args:
      scores: float [length, 2] for start and end.
      allowed: bool [length], the tokens that it may start or end with.
      longest: tokens that it has at most.

    Returns:
      Its first token, and the one after its last; (0, 0) if none is allowed.
    """
    starts, ends = np.where(allowed[:, None], scores, -np.inf).T
    sums = starts[:, None] + ends[None, :]
    at = np.arange(len(scores))
    far = at[None, :] - at[:, None]
    sums = np.where((far >= 0) & (far < longest), sums, -np.inf)
    if not np.isfinite(sums).any():
        return 0, 0
    start, end = divmod(int(np.argmax(sums)), len(scores))
    return start, end + 1


def written(
    examinee: Examinee,
    contexts: Sequence[str],
    *,
    new_tokens: int,
    stop: Sequence[str],
    keeps: Callable[[int, int], bool] = lambda cut, index: True,
    temperature: float = 0,
    **sampling: Any,
) -> tuple[list[str | None], int]:
    """What the model writes after each context, and how many contexts were cut.

    Of a context that is too long (by ``cut`` tokens) and that ``keeps(cut, index)`` does not keep, there is None.
    ``sampling`` are further options of ``model.generate``.
    """
    fits = [fitted(examinee, text, new_tokens) for text in contexts]
    kept = [i for i, (_, cut) in enumerate(fits) if keeps(cut, i)]
    prompts, model = [fits[i][0] for i in kept], examinee.model
    sampling = {"repetition_penalty": 1.0, **sampling, "temperature": temperature}
    shapes = [bucket(len(text.ids), model.spec.context) for text in model.tokenize(prompts)]
    texts: list[str | None] = [None] * len(contexts)
    for _, group in batches(shapes, examinee.scorer.rows):
        chosen = [prompts[i] for i in group]
        done = model.generate(chosen, max_new_tokens=new_tokens, stop=stop, seed=[kept[i] for i in group], **sampling)
        for i, completion in zip(group, done, strict=True):
            texts[kept[i]] = completion.text
    return texts, sum(fits[i][1] > 0 for i in kept)


def fitted(examinee: Examinee, text: str, new_tokens: int) -> tuple[str, int]:
    """A prompt that leaves room for so many new tokens, its front cut if need be, and the tokens that it was too long
    by."""
    model = examinee.model
    room = model.spec.context - (0 if model.spec.encoder else new_tokens)
    if room < 2 or new_tokens >= model.spec.context:
        raise UserError(f"{new_tokens} new tokens leave no room for a prompt in a context of {model.spec.context}")
    ids = model.tokenize([text])[0].ids
    excess = cut = max(0, len(ids) - room)
    while excess > 0:
        own = examinee.tokenizer.encode(text)
        text = examinee.tokenizer.decode(own[excess:])
        excess = len(model.tokenize([text])[0].ids) - room
    return text, cut
