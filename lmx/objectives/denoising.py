"""Denoising: span corruption (Raffel et al. 2020, 3.3), prefix language models, and mixtures (Tay et al. 2022)."""

import abc
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from lmx.config import BETWEEN, COUNT, POSITIVE
from lmx.data.layout import Piece
from lmx.errors import UserError
from lmx.models.config import ModelConfig
from lmx.objectives.source_target import Maker, Pair, SourceTarget
from lmx.objectives.vocabulary import Vocabulary


def sentinel(index: int) -> str:
    """The name of the token that stands for the span number ``index``, as T5's tokenizers have it."""
    return f"<extra_id_{index}>"


@dataclass(frozen=True)
class Denoiser(abc.ABC):
    """One way to make a source and a target of a text; its weight is relative to those of the mixture's others."""

    weight: Annotated[float, POSITIVE] = 1.0
    token: str = ""
    """A special token that stands before the source and tells which way it is (UL2's mode tokens); none if empty."""

    @abc.abstractmethod
    def sizes(self, count: int) -> list[tuple[int, int]]:
        """Tokens of source and target, without ends, of a text of ``count`` (at least 2): the extremes."""

    @abc.abstractmethod
    def corrupted(self, text: np.ndarray, sentinels: np.ndarray, rng: np.random.Generator) -> Pair:
        """A text of at least 2 tokens as a source and a target, without ends."""

    def spans(self, count: int) -> int:
        """Sentinels that a text of ``count`` tokens takes."""
        return 0


@dataclass(frozen=True)
class SpanDenoiser(Denoiser):
    """Spans are replaced by sentinels, and the target is each sentinel with its span."""

    density: Annotated[float, BETWEEN] = 0.15
    """Share of the tokens that are in spans."""
    span: Annotated[float, COUNT] = 3.0
    """Mean length of a span."""

    def numbers(self, count: int) -> tuple[int, int]:
        """How many tokens are noise, and in how many spans: T5's, at least one of each and one token that is not."""
        noise = min(max(round(count * self.density), 1), count - 1)
        return noise, min(max(round(noise / self.span), 1), noise, count - noise)

    def spans(self, count: int) -> int:
        """The spans."""
        return self.numbers(count)[1]

    def sizes(self, count: int) -> list[tuple[int, int]]:
        """What is left and the sentinels; the noise and the sentinels."""
        noise, spans = self.numbers(count)
        return [(count - noise + spans, noise + spans)]

    def corrupted(self, text: np.ndarray, sentinels: np.ndarray, rng: np.random.Generator) -> Pair:
        """Stretches of text and of noise take turns, text first; their lengths are random partitions."""
        noise, spans = self.numbers(len(text))
        kept, lost = partition(len(text) - noise, spans, rng), partition(noise, spans, rng)
        edges = np.cumsum(np.stack([kept, lost], axis=1).ravel())[:-1]
        stretches = np.split(text, edges)
        marks = sentinels[:spans, None]
        source = [part for pair in zip(stretches[::2], marks, strict=True) for part in pair]
        target = [part for pair in zip(marks, stretches[1::2], strict=True) for part in pair]
        return np.concatenate(source), np.concatenate(target)


@dataclass(frozen=True)
class PrefixDenoiser(Denoiser):
    """The text is cut at a random place: the source is what comes before it, the target what comes after."""

    share: Annotated[float, BETWEEN] = 0.5
    """Mean share of the tokens that are in the target. Its length is uniform over the widest range with this mean:
    every length at 0.5, up to half of the text at 0.25."""

    def targets(self, count: int) -> tuple[int, int]:
        """The fewest and the most tokens in the target."""
        both = min(max(round(2 * self.share * count), 2), 2 * (count - 1))
        return max(1, both - (count - 1)), min(count - 1, both - 1)

    def sizes(self, count: int) -> list[tuple[int, int]]:
        """The shortest and the longest target."""
        return [(count - target, target) for target in self.targets(count)]

    def corrupted(self, text: np.ndarray, sentinels: np.ndarray, rng: np.random.Generator) -> Pair:
        """Every length of the target is as likely."""
        fewest, most = self.targets(len(text))
        cut = int(rng.integers(len(text) - most, len(text) - fewest + 1))
        return text[:cut], text[cut:]


def partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """A random way to write ``total`` as an ordered sum of ``parts`` numbers above 0, each as likely: int [parts]."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


@dataclass(frozen=True)
class DenoisingMaker(Maker):
    """Draws a denoiser for each piece."""

    denoisers: tuple[Denoiser, ...]
    vocabulary: Vocabulary
    sentinels: np.ndarray

    def sizes(self, count: int) -> list[tuple[int, int]]:
        """What any denoiser gives, with an end after the target and what may stand before the source."""
        return [(s + bool(d.token), t + 1) for d in self.denoisers for s, t in d.sizes(max(count, 2))]

    def pair(self, piece: Piece, rng: np.random.Generator) -> Pair | None:
        """A piece of less than two tokens has none."""
        if len(piece.body) < 2:
            return None
        weights = np.array([d.weight for d in self.denoisers])
        index = 0 if len(weights) == 1 else int(rng.choice(len(weights), p=weights / weights.sum()))
        denoiser, end = self.denoisers[index], [self.vocabulary.end]
        source, target = denoiser.corrupted(piece.body, self.sentinels, rng)
        mode = [self.vocabulary.special[denoiser.token]] if denoiser.token else []
        return np.concatenate([mode, source]).astype(np.int32), np.concatenate([target, end]).astype(np.int32)


@dataclass(frozen=True)
class Denoising(SourceTarget):
    """Base class of the objectives whose source is a corrupted text."""

    @property
    def mixture(self) -> tuple[Denoiser, ...]:
        """The ways of corruption."""
        return ()

    @property
    def reserved(self) -> int:
        """Sentinels that the tokenizer has."""
        return 0

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The sentinels and the mode tokens."""
        modes = dict.fromkeys(d.token for d in self.mixture if d.token)
        return *(sentinel(i) for i in range(self.reserved)), *modes

    def maker(self, vocabulary: Vocabulary) -> Maker:
        """Draws of the mixture."""
        sentinels = np.array([vocabulary.special[sentinel(i)] for i in range(self.reserved)], np.int32)
        return DenoisingMaker(self.mixture, vocabulary, sentinels)

    def check(self, model: ModelConfig, length: int) -> None:
        """As a source and a target; and there are sentinels enough for a row."""
        super().check(model, length)
        for denoiser in self.mixture:
            count = 2
            while denoiser.sizes(count + 1)[0][0] < length and count < 4 * length:
                count += 1
            if denoiser.spans(count) > self.reserved:
                raise UserError(
                    f"rows of {length} tokens take {denoiser.spans(count)} sentinels, more than objective.sentinels "
                    f"{self.reserved}: raise it, lower train.length, or make spans longer"
                )


@dataclass(frozen=True)
class SpanCorruption(Denoising):
    """T5's pretraining: spans are replaced by sentinels, and the target says what they were."""

    density: Annotated[float, BETWEEN] = 0.15
    """Share of the tokens that are in spans."""
    span: Annotated[float, COUNT] = 3.0
    """Mean length of a span."""
    sentinels: Annotated[int, COUNT] = 100
    """Sentinel tokens <extra_id_0>, <extra_id_1>, ... of the tokenizer."""

    @property
    def mixture(self) -> tuple[Denoiser, ...]:
        """The one denoiser."""
        return (SpanDenoiser(density=self.density, span=self.span),)

    @property
    def reserved(self) -> int:
        """Sentinels that the tokenizer has."""
        return self.sentinels


@dataclass(frozen=True)
class PrefixLm(Denoising):
    """The rest of a text from its beginning, which is read in both directions."""

    @property
    def mixture(self) -> tuple[Denoiser, ...]:
        """The one denoiser."""
        return (PrefixDenoiser(),)


UL2 = (
    SpanDenoiser(density=0.15, span=3, token="[NLU]"),
    SpanDenoiser(density=0.15, span=8, token="[NLU]"),
    SpanDenoiser(density=0.5, span=3, token="[NLG]"),
    SpanDenoiser(density=0.5, span=8, token="[NLG]"),
    SpanDenoiser(density=0.15, span=64, token="[NLG]"),
    SpanDenoiser(density=0.5, span=64, token="[NLG]"),
    PrefixDenoiser(share=0.25, token="[S2S]"),
)
"""Table 1 of Tay et al. 2022, every denoiser as likely: the R-denoisers, the X-denoisers and the S-denoiser."""


@dataclass(frozen=True)
class Denoisers(Denoising):
    """A mixture of denoisers; the default is UL2's. A row is planned for whichever of them takes most."""

    denoisers: tuple[Denoiser, ...] = UL2
    """The ways of corruption, drawn by weight for each piece of text."""
    sentinels: Annotated[int, COUNT] = 100
    """Sentinel tokens <extra_id_0>, <extra_id_1>, ... of the tokenizer."""

    @property
    def mixture(self) -> tuple[Denoiser, ...]:
        """Those that are set."""
        return self.denoisers

    @property
    def reserved(self) -> int:
        """Sentinels that the tokenizer has."""
        return self.sentinels

    def check(self, model: ModelConfig, length: int) -> None:
        """As any; and there is one."""
        if not self.denoisers:
            raise UserError("objective.denoisers is empty: give at least one, such as SpanDenoiser()")
        super().check(model, length)
