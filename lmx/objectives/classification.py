"""Texts, or pairs of texts, that have classes or numbers (Devlin et al. 2018, 4.1; Radford et al. 2018, 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmx.config import BELOW_ONE
from lmx.data.framing import Framed, Frames
from lmx.data.layout import Piece, Row
from lmx.errors import UserError
from lmx.kernels.cross_entropy import LossSums
from lmx.models.config_map import Task
from lmx.objectives.labelled import EIGHT, ExampleRows, Labelled, check_classes, class_measures, segment_count
from lmx.objectives.objective import Batch, Targets


@dataclass(frozen=True)
class Classification(Labelled):
    """Cross-entropy of a text's one class."""

    longer: Literal["truncate", "drop"] = "truncate"
    """What becomes of examples that take more than a row: their ends are cut, or they are left out; either is
    counted."""
    label_smoothing: Annotated[float, BELOW_ONE] = 0.0
    """Share of each class's probability that is spread over all of them."""

    task: ClassVar[Task] = "sequence_classification"
    problem: ClassVar[str] = "single_label_classification"

    def rows(self, length: int, frames: Frames, typed: bool, start: int | None, outputs: int) -> ExampleRows:
        """Rows with one class for each example."""
        return ClassRows(length, frames, typed, start, outputs, self.longer, smallest=EIGHT)

    def scored(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The classes, int32 [batch, places], and float32 weights, 0 where there is no example."""
        return jnp.maximum(batch["labels"] - 1, 0), (batch["labels"] > 0).astype(jnp.float32)

    def score(self, scores: jax.Array, batch: Batch) -> tuple[LossSums, dict[str, jax.Array]]:
        """See :class:`Labelled`."""
        labels, weights = self.scored(batch)
        return class_sums(scores, labels, weights, self.label_smoothing)


@dataclass(frozen=True)
class MultiLabel(Labelled):
    """Binary cross-entropy of each class: none, one or several hold of a text. A text counts once; its loss and its
    accuracy are means over the classes."""

    longer: Literal["truncate", "drop"] = "truncate"
    """What becomes of examples that take more than a row: their ends are cut, or they are left out; either is
    counted."""

    task: ClassVar[Task] = "sequence_classification"
    problem: ClassVar[str] = "multi_label_classification"

    def rows(self, length: int, frames: Frames, typed: bool, start: int | None, outputs: int) -> ExampleRows:
        """Rows with the classes of each example."""
        return ManyClassRows(length, frames, typed, start, outputs, self.longer, smallest=EIGHT)

    def scored(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """1 where a class holds, int32 [batch, places * classes], and float32 weights that are 1 together for each
        text."""
        given = batch["labels"]
        share = segment_count(batch["segment_ids"].shape[1]) / given.shape[1]
        return jnp.maximum(given - 1, 0), (given > 0) * jnp.float32(share)

    def score(self, scores: jax.Array, batch: Batch) -> tuple[LossSums, dict[str, jax.Array]]:
        """See :class:`Labelled`."""
        labels, weights = (a.reshape(scores.shape) for a in self.scored(batch))
        nll = (optax.sigmoid_binary_cross_entropy(scores, labels) * weights).sum()
        guesses, there = scores > 0, (weights > 0).astype(jnp.float32)
        sums = LossSums(nll, nll, weights.sum(), ((guesses == (labels > 0)) * weights).sum())
        counts = {"hits": guesses * labels, "guesses": guesses, "cases": labels}
        return _plain(sums), {name: (count * there).sum((0, 1)) for name, count in counts.items()}


@dataclass(frozen=True)
class Regression(Labelled):
    """The squared error of a text's numbers, a mean over them; model.classes is how many there are."""

    longer: Literal["truncate", "drop"] = "truncate"
    """What becomes of examples that take more than a row: their ends are cut, or they are left out; either is
    counted."""

    targets: ClassVar[Targets] = "numbers"
    task: ClassVar[Task] = "sequence_classification"
    problem: ClassVar[str] = "regression"

    def rows(self, length: int, frames: Frames, typed: bool, start: int | None, outputs: int) -> ExampleRows:
        """Rows with the numbers of each example."""
        return NumberRows(length, frames, typed, start, outputs, self.longer, smallest=EIGHT)

    def scored(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """No classes: zeros, int32 [batch, places], and float32 weights, 0 where there is no example."""
        return jnp.zeros_like(batch["labels"]), (batch["labels"] > 0).astype(jnp.float32)

    def score(self, scores: jax.Array, batch: Batch) -> tuple[LossSums, dict[str, jax.Array]]:
        """See :class:`Labelled`."""
        weights = self.scored(batch)[1]
        error = jnp.square(scores - batch["numbers"].reshape(scores.shape)).mean(-1)
        total = (error * weights).sum()
        return _plain(LossSums(total, total, weights.sum(), jnp.float32(0))), {}


def class_sums(
    scores: jax.Array, labels: jax.Array, weights: jax.Array, smoothing: float = 0.0
) -> tuple[LossSums, dict[str, jax.Array]]:
    """The sums and measures of cross-entropies: float32 scores [..., classes], int32 labels and weights [...]."""
    logs = jax.nn.log_softmax(scores)
    nll = -jnp.take_along_axis(logs, labels[..., None], axis=-1)[..., 0]
    loss = (1 - smoothing) * nll - smoothing * logs.mean(-1)
    guesses = scores.argmax(-1)
    correct = ((guesses == labels) * weights).sum()
    sums = LossSums((loss * weights).sum(), (nll * weights).sum(), weights.sum(), correct)
    return _plain(sums), class_measures(guesses, labels, weights, scores.shape[-1])


def _plain(sums: LossSums) -> LossSums:
    """The sums, of which the total alone carries a gradient."""
    nll, weight, correct = jax.lax.stop_gradient((sums.nll, sums.weight, sums.correct))
    return LossSums(sums.total, nll, weight, correct)


@dataclass(frozen=True)
class ClassRows(ExampleRows):
    """``labels``, int32 [places]: 1 + the class of each example in the row, 0 where there is none."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Texts with classes."""
        return ("classes",)

    def check_examples(self, name: str, classes: Sequence[str], counts: np.ndarray) -> None:
        """As many classes as outputs, and one for each example."""
        check_classes(name, "classes", classes, self.outputs)
        if (counts != 1).any():
            raise UserError(
                f"the source {name} has an example with {int(counts[counts != 1][0])} classes, but Classification "
                "learns one of each: use MultiLabel"
            )

    def label_arrays(self) -> Row:
        """See the class."""
        return {"labels": np.zeros(segment_count(self.length), np.int32)}

    def label(self, row: Row, segment: int, at: int, piece: Piece, framed: Framed) -> None:
        """See the class."""
        assert piece.labels is not None, "the documents have no labels"
        row["labels"][segment - 1] = 1 + piece.labels[0]

    def invented_labels(self, rng: np.random.Generator, count: int) -> np.ndarray | None:
        """One class."""
        return rng.integers(0, self.outputs, 1, np.int32)


@dataclass(frozen=True)
class ManyClassRows(ClassRows):
    """``labels``, int32 [places * classes]: 2 where a class holds of an example, 1 where it does not, 0 where there
    is no example."""

    def check_examples(self, name: str, classes: Sequence[str], counts: np.ndarray) -> None:
        """As many classes as outputs."""
        check_classes(name, "classes", classes, self.outputs)

    def label_arrays(self) -> Row:
        """See the class."""
        return {"labels": np.zeros(segment_count(self.length) * self.outputs, np.int32)}

    def label(self, row: Row, segment: int, at: int, piece: Piece, framed: Framed) -> None:
        """See the class."""
        assert piece.labels is not None, "the documents have no labels"
        own = row["labels"].reshape(-1, self.outputs)[segment - 1]
        own[:] = 1
        own[piece.labels.astype(np.int64)] = 2

    def invented_labels(self, rng: np.random.Generator, count: int) -> np.ndarray | None:
        """Some of the classes."""
        return np.flatnonzero(rng.random(self.outputs) < 0.5).astype(np.int32)


@dataclass(frozen=True)
class NumberRows(ExampleRows):
    """``labels``, int32 [places]: 1 where there is an example; ``numbers``, float32 [places * numbers]."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Texts with numbers."""
        return ("numbers",)

    def check_examples(self, name: str, classes: Sequence[str], counts: np.ndarray) -> None:
        """As many numbers as outputs."""
        if (counts != self.outputs).any():
            other = int(counts[counts != self.outputs][0])
            raise UserError(
                f"the source {name} has an example with {other} numbers, but model.classes is {self.outputs}: set "
                f"--model.classes {other}, and give each example as many"
            )

    def label_arrays(self) -> Row:
        """See the class."""
        places = segment_count(self.length)
        return {"labels": np.zeros(places, np.int32), "numbers": np.zeros(places * self.outputs, np.float32)}

    def label(self, row: Row, segment: int, at: int, piece: Piece, framed: Framed) -> None:
        """See the class."""
        assert piece.labels is not None, "the documents have no labels"
        row["labels"][segment - 1] = 1
        row["numbers"].reshape(-1, self.outputs)[segment - 1] = piece.labels

    def invented_labels(self, rng: np.random.Generator, count: int) -> np.ndarray | None:
        """Normal numbers."""
        return rng.standard_normal(self.outputs).astype(np.float32)
