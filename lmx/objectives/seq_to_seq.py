"""Sequence to sequence (Sutskever et al. 2014; Vaswani et al. 2017): translation, summarisation, any pairs of texts."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmx.data.layout import Piece
from lmx.objectives.source_target import Maker, Pair, SourceTarget
from lmx.objectives.vocabulary import Vocabulary


@dataclass(frozen=True)
class SeqToSeq(SourceTarget):
    """The target of each pair that the data's sources give (Docstrings, AlignedFiles), from its source."""

    longer: Literal["truncate", "drop"] = "truncate"
    """What becomes of pairs that take more than a row: their ends are cut, or they are left out; either is counted."""

    @property
    def ends_source(self) -> bool:
        """After the source."""
        return True

    def maker(self, vocabulary: Vocabulary) -> Maker:
        """The pairs as they are."""
        return GivenPairs(vocabulary.end, longer=self.longer)


@dataclass(frozen=True)
class GivenPairs(Maker):
    """The documents' own sources and targets."""

    end: int
    longer: str = "truncate"
    separated: bool = True

    def sizes(self, count: int) -> list[tuple[int, int]]:
        """Of a pair as long on either side; others say themselves what they take."""
        return [(count, count + 1)]

    def pair(self, piece: Piece, rng: np.random.Generator) -> Pair | None:
        """See the class."""
        assert piece.target is not None, "the documents are no pairs"
        return piece.tokens, np.append(piece.target, np.int32(self.end))
