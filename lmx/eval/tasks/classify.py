"""Classification, by the likelihood of words or by a task head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmx.data.tokenizer import Encoded, Text
from lmx.decode import forward, rows
from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.eval.likelihood import batches, bucket, filled, on_mesh, padded, readable
from lmx.eval.metrics.classification import BINS, classification_measures
from lmx.eval.tables import Example
from lmx.eval.tasks.choice import chosen
from lmx.eval.tasks.task import Examinee, Outcome, Prompted, Template, rendered, value


@dataclass(frozen=True)
class Classification(Prompted):
    """Each example is of one class; accuracy, F1 (macro, micro, and of two classes binary), Matthews' correlation and
    expected calibration error.

    With ``words`` the class is the one whose word is likeliest after the prompt, without them the one that the
    model's task head gives the highest score for the text ``prompt`` (or the pair of it and ``second``).
    """

    classes: tuple[str, ...] = ()
    """Their names: the model's own, in any order, where it has names (the default), else any, in the order of a task
    head's outputs."""
    label: str | Callable[[Example], Any] = "label"
    """A column or a function: the name of the right class, or its number in ``classes``."""
    words: tuple[str, ...] = ()
    """For each class, what the model would say; () asks the task head."""
    second: Template | None = None
    """The second text of a pair, for a task head."""
    positive: int = 1
    """Of two classes, the one that ``f1_binary`` is about."""

    def run(self, examinee: Examinee) -> Outcome:
        """See :class:`Task`."""
        return replace(self, classes=self.classes or examinee.model.classes)._measured(examinee)

    def _measured(self, examinee: Examinee) -> Outcome:
        if len(self.classes) < 2 or (self.words and len(self.words) != len(self.classes)):
            raise UserError(
                f"the task has {len(self.classes)} classes and {len(self.words)} words; give two or more classes, "
                "and a word for each or none"
            )
        examples = self.examples()
        if self.words:
            asked = self.asked(examinee, examples, lambda row: self.words)
            found = [[score.logprob for score in own] for own in asked.scores(examinee)]
            kept, truncated, scores = asked.kept, asked.truncated, np.array(found).reshape(-1, len(self.words))
        else:
            kept, truncated, scores = self._by_head(examinee, examples)
        right = np.array([chosen(value(self.label, examples[i]), self.classes) for i in kept], int)
        measures = classification_measures(right, softmax(scores), positive=self.positive)
        note = {"calibration_error": f"{BINS} equal bins", "by": "words" if self.words else "task head"}
        return Outcome(len(kept), measures, note, truncated, len(examples) - len(kept))

    def answer_text(self, row: Example) -> str:
        """The word of the right class."""
        return (self.words or self.classes)[chosen(value(self.label, row), self.classes)]

    def _by_head(self, examinee: Examinee, examples: Sequence[Example]) -> tuple[list[int], int, np.ndarray]:
        """The examples that are kept, how many of them were cut, and their scores [kept, classes]."""
        if self.shots or self.description:
            raise UserError("a task head reads a text alone: shots and description need words for the classes")
        outputs, room = self._outputs(examinee.model), examinee.model.spec.context
        encoded = examinee.model.tokenize([self._text(row) for row in examples])
        cuts = [max(0, len(text.ids) - room) for text in encoded]
        kept = [i for i, cut in enumerate(cuts) if self.keeps(cut, i)]
        scores = head_scores(examinee, [ended(encoded[i], room) for i in kept])
        if scores.ndim != 2 or scores.shape[1] != len(self.classes):
            raise UserError(
                f"the model's head gives {scores.shape[1:]} scores, but there are {len(self.classes)} classes"
            )
        return kept, sum(cuts[i] > 0 for i in kept), scores[:, outputs]

    def _outputs(self, model: Model) -> list[int]:
        """Which of the head's outputs each class is.

        Raises:
          UserError: the model knows its classes by other names.
        """
        names = model.classes or self.classes
        if sorted(names) != sorted(self.classes):
            raise UserError(
                f"the task's classes are {', '.join(self.classes)}, but the model's are {', '.join(names)}; give the "
                "model's names, in any order, or none"
            )
        return [names.index(name) for name in self.classes]

    def _text(self, row: Example) -> Text:
        first = rendered(self.prompt, row)
        return first if self.second is None else (first, rendered(self.second, row))


def ended(text: Encoded, room: int) -> Encoded:
    """A text of at most ``room`` tokens: what is too much is cut before its last token, which ends it."""
    if len(text.ids) <= room:
        return text
    return Encoded(*([*part[: room - 1], part[-1]] for part in text))


def head_scores(examinee: Examinee, texts: Sequence[Encoded]) -> np.ndarray:
    """Float32 scores of the model's task head, [texts, classes] or [texts, longest, outputs].

    Raises:
      UserError: a model without such a head.
    """
    model, spec = examinee.model, examinee.model.spec
    heads = [head for head in spec.tasks if head.name != forward.POOLED]
    if not heads:
        raise UserError(
            f"this {model.config.family} has no task head ({model.config.task}); give words for the classes"
        )
    if not texts:
        return np.zeros((0, heads[0].outputs), np.float32)
    shapes = [bucket(len(text.ids), spec.context) for text in texts]
    scores: dict[int, np.ndarray] = {}
    for length, group in batches(shapes, examinee.scorer.rows):
        inputs = padded([texts[i].ids for i in group], length)
        if (spec.encoder or spec).embedding.types > 1:
            inputs = replace(inputs, types=jnp.asarray(filled([texts[i].types for i in group], length)))
        decoder = None if spec.encoder is None else rows.shifted(inputs, spec.encoder.decoder_start)
        both = (own and on_mesh(own, model.sharding) for own in (inputs, decoder))
        found = forward.task_scores(spec, model.sharding, heads[0].name, examinee.scorer.params, *both)
        scores |= dict(zip(group, readable(found, model.sharding), strict=True))
    return _stacked([scores[i] for i in range(len(texts))])


def _stacked(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Scores of each text as one array; those of tokens are padded with zeros."""
    if scores[0].ndim == 1:
        return np.array(scores, np.float32)
    longest = max(len(own) for own in scores)
    return np.stack([np.pad(own, ((0, longest - len(own)), (0, 0))) for own in scores])


def softmax(scores: np.ndarray) -> np.ndarray:
    """Float64 probabilities over the last axis."""
    shifted = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(-1, keepdims=True)
