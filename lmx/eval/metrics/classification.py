"""Measures of classes: accuracy, F1, Matthews' correlation, and the expected calibration error."""

import math

import numpy as np

from lmx.eval.metrics.measure import Measure, bootstrapped, check_some, mean

BINS = 15


def classification_measures(
    expected: np.ndarray, probabilities: np.ndarray, *, positive: int = 1
) -> dict[str, Measure]:
    """What is usually told of a classifier.

    Args:
      expected: int [n], the right classes.
      probabilities: float [n, classes], rows that sum to 1; the highest is the answer.
      positive: of two classes, the one whose F1 is ``f1_binary``.

    Returns:
      ``accuracy``, ``f1_macro``, ``f1_micro``, of two classes ``f1_binary``, ``matthews`` and
      ``calibration_error``.

    Raises:
      UserError: no examples.
    """
    check_some(len(expected), "accuracy")
    answers, classes, n = probabilities.argmax(1), probabilities.shape[1], len(expected)
    pairs = expected * classes + answers

    def confusion(index: np.ndarray) -> np.ndarray:
        return np.bincount(pairs[index], minlength=classes * classes).reshape(classes, classes)

    found = {"accuracy": mean(answers == expected, "accuracy")}
    found["f1_macro"] = bootstrapped(lambda i: float(f1(confusion(i)).mean()), n, "f1_macro")
    # Of one answer to each question, all classes together have as many wrong ones as missed ones.
    found["f1_micro"] = mean(answers == expected, "f1_micro")
    if classes == 2:
        found["f1_binary"] = bootstrapped(lambda i: float(f1(confusion(i))[positive]), n, "f1_binary")
    found["matthews"] = bootstrapped(lambda i: matthews(confusion(i)), n, "matthews")
    right, sure = answers == expected, probabilities.max(1)
    error = bootstrapped(lambda i: calibration_error(right[i], sure[i]), n, "calibration_error", better=False)
    return {**found, "calibration_error": error}


def f1(confusion: np.ndarray) -> np.ndarray:
    """Each class's harmonic mean of precision and recall, float [classes], 0 where neither is.

    ``confusion`` is int [classes, classes]: how often each class (first) was taken for each (second).
    """
    right, both = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    return np.divide(2 * right, both, out=np.zeros(len(right)), where=both > 0)


def matthews(confusion: np.ndarray) -> float:
    """Matthews' correlation of what is with what was answered, for any number of classes (Gorodkin 2004); 0 where
    either is always the same."""
    total, there, given = float(confusion.sum()), confusion.sum(1).astype(float), confusion.sum(0).astype(float)
    spread = (total**2 - there @ there) * (total**2 - given @ given)
    return float((total * np.trace(confusion) - there @ given) / math.sqrt(spread)) if spread > 0 else 0.0


def calibration_error(right: np.ndarray, confidence: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error (Guo et al. 2017, 2): over equal bins of confidence, the mean distance of the
    share of right answers from the mean confidence, weighted by the examples in a bin.

    Args:
      right: bool [n].
      confidence: float [n], the probability of the answer that was given.
      bins: (0, 1] is cut into so many, each with its upper end.
    """
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(places, right, bins) - np.bincount(places, confidence, bins)
    return float(np.abs(gaps).sum() / len(right))
