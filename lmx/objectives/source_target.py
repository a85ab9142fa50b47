"""Objectives that learn a target from a source, with any model that predicts tokens.

An encoder-decoder reads the source in its encoder. A decoder reads it as a prefix that all of its segment sees, and the
target after it (Raffel et al. 2020, 3.2.1). Several pairs share a row: segment i of the decoder sees segment i of the
encoder and nothing else.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmx.data.layout import Layout, Other, Piece, Row, Whole, empty_row
from lmx.errors import UserError
from lmx.kernels.masks import Causal
from lmx.models.config import ModelConfig
from lmx.models.model import Inputs
from lmx.models.specs import ModelSpec
from lmx.objectives.objective import Batch, Reading, TokenPrediction, check_decoder
from lmx.objectives.vocabulary import Vocabulary

Pair = tuple[np.ndarray, np.ndarray]
"""The tokens of a source [any] and a target [any], of which the target has its end token."""


class Maker(abc.ABC):
    """Makes a source and a target of a piece."""

    longer: str = ""
    """Where documents are pairs: what becomes of those that take more than a row, ``drop`` or ``truncate``."""
    separated: bool = False
    """Whether an end token parts source and target where both are one text."""

    @abc.abstractmethod
    def sizes(self, count: int) -> list[tuple[int, int]]:
        """Tokens of source and target that a piece of ``count`` predictions can give: the extremes."""

    @abc.abstractmethod
    def pair(self, piece: Piece, rng: np.random.Generator) -> Pair | None:
        """A piece's pair; None if it is too short to have one."""


@dataclass(frozen=True)
class SourceTarget(TokenPrediction):
    """Base class."""

    target_length: int = 0
    """Tokens in a row of an encoder-decoder's decoder; 0 is as many as train.length can need."""

    @abc.abstractmethod
    def maker(self, vocabulary: Vocabulary) -> Maker:
        """What makes the pairs."""

    @property
    def reads_prefix(self) -> bool:
        """A decoder's prefix is the source."""
        return True

    def check(self, model: ModelConfig, length: int) -> None:
        """An encoder-decoder, or a decoder whose layers all see what is before them, fits."""
        spec = check_decoder(model, type(self).__name__)
        others = spec.stack.masks() - {Causal()}
        if spec.encoder is None and others:
            raise UserError(
                f"objective {type(self).__name__} lets a prefix see all of itself, which the {next(iter(others))} of a "
                f"{model.family} has no form for: use NextToken, or a model without it"
            )
        if not 0 <= self.target_length <= model.context:
            raise UserError(
                f"objective.target_length is {self.target_length}, expected 0 (by itself) to model.context "
                f"{model.context}"
            )

    def layout(self, vocabulary: Vocabulary, spec: ModelSpec, length: int) -> Layout:
        """Rows of sources and rows of targets, or of both one after the other in a model of one stack."""
        maker = self.maker(vocabulary)
        if spec.encoder is None:
            return PrefixRows(length, maker, vocabulary.end)
        return SourceTargetRows(
            length, maker, vocabulary.end, self._target_length(maker, length), spec.encoder.decoder_start
        )

    def _target_length(self, maker: Maker, length: int) -> int:
        """What is set, else what the longest piece that fits the encoder needs, in eights."""
        if self.target_length or maker.longer:
            return self.target_length or length
        count = 1
        while max(s for s, _ in maker.sizes(count + 1)) < length and count < 4 * length:
            count += 1
        return min(length, 8 * -(-max(t for _, t in maker.sizes(count)) // 8))

    def reading(self, spec: ModelSpec, batch: Batch) -> Reading:
        """The sources in the encoder, and what comes before each target's token in the decoder; or both in the one."""
        source = Inputs(batch["tokens"], batch["positions"], batch["segment_ids"])
        if spec.encoder is None:
            return Reading(replace(source, prefix=batch["prefix"] > 0))
        return Reading(Inputs(batch["decoder_tokens"], batch["decoder_positions"], batch["target_segments"]), source)


@dataclass(frozen=True)
class PairRows(Layout):
    """Base class: rows of the pairs that ``maker`` makes."""

    maker: Maker
    end: int

    @abc.abstractmethod
    def size(self, source: np.ndarray | int, target: np.ndarray | int) -> np.ndarray:
        """Positions of the row that a pair of so many tokens takes, the source's own without an end."""

    @abc.abstractmethod
    def fill(self, row: Row, segment: int, at: tuple[int, int], pair: Pair) -> None:
        """Writes a pair where the encoder's and the decoder's next free positions are."""

    @abc.abstractmethod
    def cut(self, pair: Pair) -> Pair:
        """A pair that fits one row, with the end that its source needs."""

    def room(self, count: int) -> int:
        """What the longest pair of a piece takes."""
        return max(int(self.size(*sizes)) for sizes in self.maker.sizes(count))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Pairs, or texts from which they are made."""
        return ("pairs",) if self.maker.longer else ("texts",)

    @property
    def whole(self) -> Whole | None:
        """Of documents that are pairs, with an end after the target."""
        return Whole(lambda s, t: self.size(s, t + 1), self.maker.longer) if self.maker.longer else None

    def row(self, pieces: Sequence[Piece], rng: np.random.Generator, other: Other) -> Row:
        """The pairs of the pieces, in order."""
        row, at, segment = self.empty(), (0, 0), 0
        for piece in pieces:
            made = self.maker.pair(piece, rng)
            if made is not None:
                pair, segment = self.cut(made), segment + 1
                self.fill(row, segment, at, pair)
                at = (at[0] + len(pair[0]), at[1] + len(pair[1]))
        return row


@dataclass(frozen=True)
class SourceTargetRows(PairRows):
    """int32 [length]: ``tokens``, ``segment_ids``, ``positions`` of the sources. int32 [target_length]:
    ``decoder_tokens``, ``decoder_positions``, ``targets``, ``target_segments``."""

    target_length: int
    start: int

    @property
    def identity(self) -> tuple[object, ...]:
        """Both lengths and what pieces take."""
        return self.target_length, self.maker.longer, *(() if self.maker.longer else self.rooms.tolist())

    def empty(self) -> Row:
        """All zero."""
        sizes = dict.fromkeys(("tokens", "segment_ids", "positions"), self.length)
        names = ("decoder_tokens", "decoder_positions", "targets", "target_segments")
        return {k: np.zeros(n, np.int32) for k, n in (sizes | dict.fromkeys(names, self.target_length)).items()}

    def size(self, source: np.ndarray | int, target: np.ndarray | int) -> np.ndarray:
        """The larger share, of either row: pairs whose sizes fit the one row then fit both."""
        return np.maximum(np.asarray(source) + 1, -(-np.asarray(target) * self.length // self.target_length))

    def cut(self, pair: Pair) -> Pair:
        """The first tokens of each, and its end."""
        source = np.append(pair[0], np.int32(self.end))
        return shortened(source, self.length), shortened(pair[1], self.target_length)

    def fill(self, row: Row, segment: int, at: tuple[int, int], pair: Pair) -> None:
        """The decoder reads its start token and then the target but its last."""
        (source, target), (i, j) = pair, at
        place, seen = slice(i, i + len(source)), slice(j, j + len(target))
        row["tokens"][place], row["positions"][place] = source, np.arange(len(source))
        row["decoder_tokens"][seen] = [self.start, *target[:-1]]
        row["targets"][seen], row["decoder_positions"][seen] = target, np.arange(len(target))
        row["segment_ids"][place] = row["target_segments"][seen] = segment


@dataclass(frozen=True)
class PrefixRows(PairRows):
    """int32 [length]: ``tokens``, ``targets``, ``segment_ids``, ``positions`` as for next tokens; ``prefix``, 1 in the
    source; ``target_segments``, 0 where what follows is the source's own."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What pieces take."""
        return ("prefix", self.maker.longer) if self.maker.longer else super().identity

    def empty(self) -> Row:
        """All zero."""
        return empty_row(self.length) | {k: np.zeros(self.length, np.int32) for k in ("prefix", "target_segments")}

    def size(self, source: np.ndarray | int, target: np.ndarray | int) -> np.ndarray:
        """All tokens but the last, which is only predicted."""
        return np.asarray(source) + int(self.maker.separated) + target - 1

    def cut(self, pair: Pair) -> Pair:
        """At most half of the row for the target, the rest for the source."""
        room = self.length + 1
        source = np.append(pair[0], np.int32(self.end)) if self.maker.separated else pair[0]
        target = shortened(pair[1], max(room - len(source), room // 2))
        return shortened(source, room - len(target)), target

    def fill(self, row: Row, segment: int, at: tuple[int, int], pair: Pair) -> None:
        """The source and the target are one text."""
        stream, first = np.concatenate(pair), at[0] + at[1] - (segment - 1)
        place, source = slice(first, first + len(stream) - 1), first + len(pair[0])
        row["tokens"][place], row["targets"][place] = stream[:-1], stream[1:]
        row["segment_ids"][place], row["positions"][place] = segment, np.arange(len(stream) - 1)
        row["prefix"][first:source] = 1
        row["target_segments"][source - 1 : place.stop] = segment


def shortened(tokens: np.ndarray, length: int) -> np.ndarray:
    """At most ``length`` tokens, the last of which stays the last."""
    return tokens if len(tokens) <= length else np.concatenate([tokens[: length - 1], tokens[-1:]])
