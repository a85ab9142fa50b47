"""Which tokens a masked language model has to predict, and what stands in their place."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from lmx.config import COUNT, SHARE, Within

Starts = Callable[[], np.ndarray]


class Chosen(NamedTuple):
    """Tokens to predict: int [chosen] places, rising, and int [chosen], the unit of each, which is replaced as one."""

    places: np.ndarray
    units: np.ndarray


@dataclass(frozen=True)
class Masking:
    """Single tokens, each as likely as any other and replaced on its own (Devlin et al. 2018, 3.1)."""

    def chosen(self, starts: Starts, allowed: np.ndarray, budget: int, rng: np.random.Generator) -> Chosen:
        """At most ``budget`` tokens.

        Args:
          starts: gives bool [n], where words begin.
          allowed: bool [n], what may be chosen: no special token.
          budget: how many.
          rng: draws.
        """
        places = np.sort(rng.permutation(np.flatnonzero(allowed))[:budget])
        return Chosen(places, np.arange(len(places)))


@dataclass(frozen=True)
class WholeWords(Masking):
    """Words in a random order, each wholly or not at all; one that is longer than what is left of the budget is passed
    over. Their tokens are replaced one by one (the whole-word masking of BERT's authors)."""

    def chosen(self, starts: Starts, allowed: np.ndarray, budget: int, rng: np.random.Generator) -> Chosen:
        """See :class:`Masking`."""
        words, taken, left = words_of(starts(), allowed), list[np.ndarray](), budget
        for index in rng.permutation(len(words)):
            if len(words[index]) <= left:
                taken.append(words[index])
                left -= len(words[index])
        places = np.sort(np.concatenate([*taken, np.empty(0, np.int64)])).astype(np.int64)
        return Chosen(places, np.arange(len(places)))


@dataclass(frozen=True)
class Spans(Masking):
    """Runs of whole words, each replaced as one (Joshi et al. 2019, SpanBERT, 3.1)."""

    p: Annotated[float, Within(0, 1, above=True)] = 0.2
    """A run's words are geometrically distributed with this parameter, cut off at the longest."""
    longest: Annotated[int, COUNT] = 10
    """Words in a run at the most."""

    def chosen(self, starts: Starts, allowed: np.ndarray, budget: int, rng: np.random.Generator) -> Chosen:
        """See :class:`Masking`; the last run is cut where the budget ends."""
        words, unit_of, left = words_of(starts(), allowed), dict[int, int](), budget
        for unit, (first, last) in enumerate(self._runs(len(words), rng)):
            if left <= 0:
                break
            run = np.concatenate(words[first:last])
            if not unit_of.keys() & set(run.tolist()):
                unit_of |= dict.fromkeys(run[:left].tolist(), unit)
                left = budget - len(unit_of)
        places = np.array(sorted(unit_of), np.int64)
        return Chosen(places, np.array([unit_of[int(place)] for place in places], np.int64))

    def _runs(self, words: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        """Random runs, as the first word and the one after the last; as many as may be needed."""
        for _ in range(10 * words):
            length = min(int(rng.geometric(self.p)), self.longest, words)
            first = int(rng.integers(words - length + 1))
            yield first, first + length


def words_of(starts: np.ndarray, allowed: np.ndarray) -> list[np.ndarray]:
    """The places of each word, of tokens that are allowed; what is not allowed parts words."""
    places = np.flatnonzero(allowed)
    cuts = starts[places] | (np.diff(places, prepend=-2) > 1)
    return np.split(places, np.flatnonzero(cuts)[1:]) if len(places) else []


@dataclass(frozen=True)
class Replacing:
    """What stands in place of the tokens to predict: the mask, a random token, or the token itself (the rest)."""

    mask: Annotated[float, SHARE] = 0.8
    """Share that the mask token replaces."""
    random: Annotated[float, SHARE] = 0.1
    """Share that a random token replaces."""

    def replaced(
        self, tokens: np.ndarray, chosen: Chosen, mask: int, vocab: int, rng: np.random.Generator
    ) -> np.ndarray:
        """int [n] -> int [n]; the tokens of one unit share their lot."""
        out, (places, units) = tokens.copy(), chosen
        count = int(units.max()) + 1 if len(units) else 0
        lot, noise = rng.random(count)[units], rng.integers(0, vocab, len(places))
        out[places] = np.where(lot < self.mask, mask, np.where(lot < self.mask + self.random, noise, tokens[places]))
        return out
