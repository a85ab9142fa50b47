"""Tasks that are answered with a text that the model writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmx.errors import UserError
from lmx.eval.likelihood import batches, bucket
from lmx.eval.metrics.text import TEXT_METRICS
from lmx.eval.tables import Example, read_lines
from lmx.eval.tasks.task import Examinee, Outcome, Prompted, value

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
