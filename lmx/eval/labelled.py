"""What is measured of a run's own labelled examples one by one: of classes correlation and calibration too, of numbers
errors and correlations."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from lmx.data.framing import Frames
from lmx.eval.metrics.classification import classification_measures, f1
from lmx.eval.metrics.measure import Measure, bootstrapped, mean
from lmx.eval.metrics.regression import regression_measures
from lmx.kernels.cross_entropy import LossSums
from lmx.objectives.classification import Classification, Regression
from lmx.objectives.labelled import ExampleRows, Labelled
from lmx.objectives.objective import Batch, Objective

LABELS = ("labels", "numbers")
"""Arrays of a batch that say what is right of each example."""


@dataclass(frozen=True)
class Told(Labelled):
    """Another objective, which also tells ``examples``: the head's ``scores`` [batch, places, outputs], and the batch's
    arrays of :data:`LABELS`."""

    objective: Labelled

    def rows(self, length: int, frames: Frames, typed: bool, start: int | None, outputs: int) -> ExampleRows:
        """The objective's."""
        return self.objective.rows(length, frames, typed, start, outputs)

    def score(self, scores: jax.Array, batch: Batch) -> tuple[LossSums, dict[str, Any]]:
        """The objective's, and the examples."""
        sums, measures = self.objective.score(scores, batch)
        right = {name: batch[name] for name in LABELS if name in batch}
        return sums, {**measures, "examples": {"scores": scores, **right}}


def telling(objective: Objective) -> Objective:
    """What the objective is measured as: itself, or :class:`Told` where it is one of :data:`KINDS`."""
    return Told(objective) if isinstance(objective, Labelled) and type(objective) in KINDS else objective


def example_measures(objective: Objective, examples: dict[str, np.ndarray]) -> dict[str, Measure]:
    """The measures of what :class:`Told` told of an objective: float64 arrays [..., places, outputs] and
    [..., places * any], whose labels are 0 where there is no example."""
    there = examples["labels"].ravel() > 0
    arrays = {name: examples[name].reshape(len(there), -1)[there] for name in examples}
    return KINDS[type(objective)](**arrays)


def _of_classes(scores: np.ndarray, labels: np.ndarray) -> dict[str, Measure]:
    """Of scores [examples, classes] and labels [examples, 1], 1 + the class."""
    shifted = scores - scores.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    expected, answers, n, classes = labels[:, 0].astype(int) - 1, scores.argmax(1), *scores.shape
    pairs = expected * classes + answers

    def macro(index: np.ndarray) -> float:
        confusion = np.bincount(pairs[index], minlength=classes**2).reshape(classes, classes)
        return float(f1(confusion)[confusion.sum(1) > 0].mean())

    loss = replace(mean(-logs[np.arange(n), expected], "loss"), higher_is_better=False)
    found = classification_measures(expected, np.exp(logs))
    kept = {name: found[name] for name in ("matthews", "calibration_error")}
    return {"loss": loss, "accuracy": found["accuracy"], "f1": bootstrapped(macro, n, "f1"), **kept}


def _of_numbers(scores: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> dict[str, Measure]:
    """Of scores and right numbers [examples, numbers]."""
    loss = replace(mean(np.square(scores - numbers).mean(1), "loss"), higher_is_better=False)
    return {"loss": loss, **regression_measures(numbers, scores)}


KINDS: dict[type[Objective], Callable[..., dict[str, Measure]]] = {
    Classification: _of_classes,
    Regression: _of_numbers,
}
"""The objectives whose examples are measured one by one, by the arrays that :class:`Told` tells of them."""
