"""What a model says of texts that belong to classes, by the classes' names."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MULTI_LABEL = "multi_label_classification"
"""What Hugging Face calls the problem where any number of classes may hold of a text."""


class Classified(NamedTuple):
    """A text's likeliest class, or all those that hold of it where several may; and the probability of each class."""

    labels: tuple[str, ...]
    probabilities: dict[str, float]

    @property
    def label(self) -> str:
        """The likeliest class."""
        return max(self.probabilities, key=lambda name: self.probabilities[name])


def numbered(count: int) -> tuple[str, ...]:
    """What classes without names are called."""
    return tuple(f"LABEL_{i}" for i in range(count))


def classified(scores: Any, names: Sequence[str], *, several: bool) -> list[Classified]:
    """The classes of texts from float32 scores [texts, classes]: by a softmax over them, or (``several``) by a
    sigmoid of each that is at least one half."""
    logits = np.asarray(scores, np.float64)
    top = np.exp(logits - logits.max(-1, keepdims=True))
    found = 1 / (1 + np.exp(-logits)) if several else top / top.sum(-1, keepdims=True)
    best = [np.flatnonzero(p >= 0.5).tolist() if several else [int(p.argmax())] for p in found]
    return [
        Classified(tuple(names[i] for i in chosen), dict(zip(names, map(float, own), strict=True)))
        for chosen, own in zip(best, found, strict=True)
    ]
