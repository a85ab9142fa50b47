"""Answers that are spans of a context (Devlin et al. 2018, 4.2 and 4.3; SQuAD, Rajpurkar et al. 2016, 2018)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmx.data.framing import Framed, Frames
from lmx.data.layout import Piece, Row
from lmx.errors import UserError
from lmx.kernels.cross_entropy import LossSums
from lmx.kernels.scoring import MASKED
from lmx.models.config import ModelConfig
from lmx.models.config_map import Task
from lmx.objectives.labelled import EIGHT, ExampleRows, Labelled, segment_count
from lmx.objectives.objective import Batch


@dataclass(frozen=True)
class ExtractiveQa(Labelled):
    """Cross-entropy of an answer's first and last token among those of its question and context, half of it for each;
    an example that is not answered points at its first token. A window of a long context that does not hold the whole
    answer is such an example."""

    longer: Literal["split", "drop"] = "split"
    """What becomes of examples that take more than a row: windows of their contexts, or they are left out; either is
    counted."""
    overlap: int = 64
    """Tokens that a window shares with the one before it (SQuAD's doc_stride is a window's length less this)."""

    task: ClassVar[Task] = "question_answering"
    whole_text: ClassVar[bool] = False

    def check(self, model: ModelConfig, length: int) -> None:
        """A model with a head for the start and the end fits."""
        super().check(model, length)
        if not 0 <= self.overlap < length:
            raise UserError(f"objective.overlap is {self.overlap}, expected 0 to below train.length {length}")

    def rows(self, length: int, frames: Frames, typed: bool, start: int | None, outputs: int) -> ExampleRows:
        """Rows with places of answers."""
        overlap = self.overlap if self.longer == "split" else 0
        return AnswerRows(length, frames, typed, start, outputs, self.longer, overlap, smallest=EIGHT)

    def scored(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The answers' first places in the row, int32 [batch, places], and float32 weights, 0 where there is no
        example."""
        return jnp.maximum(batch["starts"] - 1, 0), (batch["starts"] > 0).astype(jnp.float32)

    def score(self, scores: jax.Array, batch: Batch) -> tuple[LossSums, dict[str, jax.Array]]:
        """See :class:`Labelled`."""
        begin, weights = self.scored(batch)
        right = jnp.stack([begin, jnp.maximum(batch["ends"] - 1, 0)], -1)
        segments = batch["segment_ids"]
        member = segments[:, None, :] == jnp.arange(1, begin.shape[1] + 1)[None, :, None]
        # [batch, places, length, 2]: each example chooses among its own tokens.
        own = jnp.where(member[..., None], scores[:, None], MASKED)
        nll = jax.nn.logsumexp(own, axis=2) - jnp.take_along_axis(own, right[:, :, None], axis=2)[:, :, 0]
        total = (nll.mean(-1) * weights).sum()
        guess = own.argmax(2)
        correct = ((guess == right).all(-1) * weights).sum()
        nll_sum, weight, correct = jax.lax.stop_gradient((total, weights.sum(), correct))
        return LossSums(total, nll_sum, weight, correct), {"f1": (span_f1(guess, right) * weights).sum()}


def span_f1(guess: jax.Array, right: jax.Array) -> jax.Array:
    """F1 of the tokens of spans int32 [..., 2] (first and last place), float32 [...]; a span that ends before it begins
    has none."""
    first, last = jnp.maximum(guess[..., 0], right[..., 0]), jnp.minimum(guess[..., 1], right[..., 1])
    sizes = [jnp.maximum(span[..., 1] - span[..., 0] + 1, 0) for span in (guess, right)]
    shared = jnp.maximum(last - first + 1, 0)
    return (2 * shared / jnp.maximum(sizes[0] + sizes[1], 1)).astype(jnp.float32)


@dataclass(frozen=True)
class AnswerRows(ExampleRows):
    """``starts`` and ``ends``, int32 [places]: 1 + the places in the row of each example's answer, 0 where there is no
    example."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Questions with answers."""
        return ("answers",)

    def ordered(self, first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
        """The question before the context."""
        return [second, first]

    def label_arrays(self) -> Row:
        """See the class."""
        return {name: np.zeros(segment_count(self.length), np.int32) for name in ("starts", "ends")}

    def label(self, row: Row, segment: int, at: int, piece: Piece, framed: Framed) -> None:
        """See the class."""
        assert piece.labels is not None, "the documents have no labels"
        first = last = at
        if len(piece.labels):
            begin, end = (int(place) - piece.start for place in piece.labels)
            if begin >= 0 and end < len(piece.tokens):
                first, last = (at + framed.starts[-1] + place for place in (begin, end))
        row["starts"][segment - 1], row["ends"][segment - 1] = first + 1, last + 1

    def invented_labels(self, rng: np.random.Generator, count: int) -> np.ndarray | None:
        """A span, or none."""
        if rng.random() < 0.25:
            return np.zeros(0, np.int32)
        return np.sort(rng.integers(0, count, 2)).astype(np.int32)
