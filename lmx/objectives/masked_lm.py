"""Masked language modelling (Devlin et al. 2018), alone or with a question about sentences."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmx.config import BETWEEN, NOT_NEGATIVE
from lmx.data.framing import Frames
from lmx.data.layout import Layout, Other, Piece, Row
from lmx.data.tokenizer import MASK
from lmx.errors import UserError
from lmx.kernels.cross_entropy import LossSums
from lmx.models.config import ModelConfig
from lmx.models.model import Inputs, task
from lmx.models.specs import ModelSpec
from lmx.nn.module import Params
from lmx.objectives.masking import Masking, Replacing
from lmx.objectives.objective import Batch, Reading, TokenLoss, TokenPrediction
from lmx.objectives.sentences import NextSentence, Sentences
from lmx.objectives.vocabulary import Vocabulary

EIGHT = 8
"""Places of a row come in eights, so that the meshes that split a row's length split them too."""
PAIR_WEIGHTS = "pair_weights"
PAIR_POSITIONS = 64
"""A row is asked about a pair for every so many of its positions, and its first eight."""


@dataclass(frozen=True)
class MaskedLm(TokenPrediction):
    """Cross-entropy of the tokens that were masked, given all others of their document."""

    framed: ClassVar[bool] = True
    whole_rows: ClassVar[bool] = True

    rate: Annotated[float, BETWEEN] = 0.15
    """Share of a text's tokens that are predicted."""
    masking: Masking = field(default_factory=Masking)
    """Which: Masking() single tokens, WholeWords(), Spans()."""
    replacing: Replacing = field(default_factory=Replacing)
    """What stands in their place."""
    sentences: Sentences = field(default_factory=Sentences)
    """What is asked beside: Sentences() nothing, NextSentence(), SentenceOrder()."""
    sentence_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of that question's loss, a mean over pairs, beside the mean over masked tokens."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The mask, and what stands around pairs."""
        return MASK, *self.sentences.special_tokens

    def check(self, model: ModelConfig, length: int) -> None:
        """An encoder that predicts tokens fits; with a question it has a head for it."""
        if self.replacing.mask + self.replacing.random > 1 + 1e-9:  # 0.9 and 0.1 may be a little more
            raise UserError(
                f"objective.replacing has the shares mask {self.replacing.mask} and random {self.replacing.random}, "
                "expected at most 1 together"
            )
        spec = model.spec()
        if spec.encoder is not None or not spec.stack.looks_ahead:
            raise UserError(
                f"objective MaskedLm needs a model that sees the whole text, which a {model.family} does not: use an "
                "encoder, such as Bert, or NextToken or SpanCorruption"
            )
        if self.sentences.asks and "nsp" not in [head.name for head in spec.tasks]:
            raise UserError(
                f"objective.sentences is {type(self.sentences).__name__}, but model.task {model.task!r} has no head "
                'for pairs: set it to "pretraining", of a family that has it, or the sentences to Sentences()'
            )
        if spec.head is None:
            raise UserError(
                f"objective MaskedLm predicts tokens, but model.task is {model.task!r}: set 'token_prediction'"
            )

    def layout(self, vocabulary: Vocabulary, spec: ModelSpec, length: int) -> Layout:
        """Rows of texts with masked tokens."""
        return MaskedRows(length, self, vocabulary, vocabulary.frames(before=True), spec.embedding.types > 1)

    def reading(self, spec: ModelSpec, batch: Batch) -> Reading:
        """Every position."""
        return Reading(Inputs(batch["tokens"], batch["positions"], batch["segment_ids"], batch.get("types")))

    def at_targets(self, hidden: jax.Array, batch: Batch) -> jax.Array:
        """The masked positions': nothing else meets the vocabulary."""
        return jnp.take_along_axis(hidden, batch["slots"][..., None], axis=1)

    def weighed(self, batch: Batch) -> Batch:
        """With ``pair_weights`` [batch, pairs]: what the step makes of their sum by dividing by the number of targets
        is the mean over the pairs of the whole batch, times ``sentence_weight``."""
        if not self.sentences.asks or PAIR_WEIGHTS in batch:
            return batch
        asked = (batch["answers"] > 0).astype(jnp.float32)
        targets = self.scored(batch)[1].sum()
        return {**batch, PAIR_WEIGHTS: asked * (self.sentence_weight * targets / jnp.maximum(asked.sum(), 1))}

    def score(
        self,
        losses: TokenLoss,
        spec: ModelSpec,
        key: jax.Array | None,
        params: Params,
        hidden: jax.Array,
        batch: Batch,
    ) -> LossSums:
        """The losses of masked tokens; ``aux`` tells what became of the pairs."""
        sums = super().score(losses, spec, key, params, hidden, batch)
        return self._with_pairs(spec, params, batch, hidden, sums, key) if self.sentences.asks else sums

    def _with_pairs(
        self, spec: ModelSpec, params: Params, batch: Batch, hidden: jax.Array, sums: LossSums, key: jax.Array | None
    ) -> LossSums:
        """The sums with the question about pairs: each pair's first state goes through the head."""
        first = jnp.take_along_axis(hidden, batch["pair_slots"][..., None], axis=1).reshape(-1, 1, hidden.shape[-1])
        answers = batch["answers"].reshape(-1)
        asked = (answers > 0).astype(jnp.float32)
        scores = task(spec, params, "nsp", first, Inputs.whole(jnp.zeros(first.shape[:2], jnp.int32)), key)
        labels = jnp.maximum(answers - 1, 0)
        nll = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        total = sums.total + (nll * batch[PAIR_WEIGHTS].reshape(-1)).sum()
        right = scores.argmax(-1) == labels
        told = {"nll": (nll * asked).sum(), "correct": (right * asked).sum(), "weight": asked.sum()}
        aux = {**sums.aux, "pairs": jax.tree.map(jax.lax.stop_gradient, told)}
        return replace(sums, total=total, aux=aux)


@dataclass(frozen=True)
class Nsp(MaskedLm):
    """BERT's own pretraining: masked tokens, and whether the second sentence follows the first."""

    sentences: Sentences = field(default_factory=NextSentence)
    """What is asked beside: NextSentence(), or SentenceOrder()."""


@dataclass(frozen=True)
class MaskedRows(Layout):
    """``tokens``, ``segment_ids``, ``positions`` (and ``types``): int32 [length]. ``slots``, the places that are
    masked, ``targets``, what stood there, and ``target_segments``, 0 where there is no more: int32 [slots]. Asking,
    ``pair_slots``, where pairs begin, and ``answers`` (0 none, 1 a true pair, 2 another): int32 [pairs]."""

    objective: MaskedLm
    vocabulary: Vocabulary
    frames: Frames
    typed: bool = False

    def room(self, count: int) -> int:
        """The predictions, and what stands around them."""
        return count + self.objective.sentences.extra(self.frames)

    @property
    def slots(self) -> int:
        """Masked tokens in a row at the most: the share of its length, in eights."""
        return _eights(self.length * self.objective.rate)

    def empty(self) -> Row:
        """All zero."""
        long = ["tokens", "segment_ids", "positions", *(["types"] if self.typed else [])]
        sizes = dict.fromkeys(long, self.length) | dict.fromkeys(("slots", "targets", "target_segments"), self.slots)
        if self.objective.sentences.asks:
            sizes |= dict.fromkeys(("pair_slots", "answers"), _eights(self.length / PAIR_POSITIONS))
        return {name: np.zeros(size, np.int32) for name, size in sizes.items()}

    def row(self, pieces: Sequence[Piece], rng: np.random.Generator, other: Other) -> Row:
        """Each piece's text, masked on its own."""
        row, at, used = self.empty(), 0, 0
        for segment, piece in enumerate(pieces, start=1):
            text = self.objective.sentences.text(piece, self.frames, rng, other)
            place = slice(at, at + len(text.tokens))
            masked = self._mask(text.tokens, text.maskable, self.slots - used, rng)
            slots = slice(used, used + len(masked[1]))
            row["tokens"][place] = masked[0]
            row["slots"][slots], row["targets"][slots] = at + masked[1], text.tokens[masked[1]]
            row["segment_ids"][place] = row["target_segments"][slots] = segment
            row["positions"][place] = np.arange(len(text.tokens))
            if self.typed:
                row["types"][place] = text.types
            if text.answer and segment <= len(row["answers"]):
                row["pair_slots"][segment - 1], row["answers"][segment - 1] = at, text.answer
            at, used = at + len(text.tokens), slots.stop
        return row

    def _mask(
        self, tokens: np.ndarray, maskable: np.ndarray, left: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens after masking, and the places of those to predict: the share of them, one at least."""
        count = int(maskable.sum())
        budget = min(left, max(1, round(count * self.objective.rate)), count)
        starts = functools.partial(self.vocabulary.word_starts, tokens)
        chosen = self.objective.masking.chosen(starts, maskable, budget, rng)
        mask, size = self.vocabulary.special[MASK], self.vocabulary.size
        return self.objective.replacing.replaced(tokens, chosen, mask, size, rng), chosen.places


def _eights(count: float) -> int:
    return EIGHT * max(1, -int(-count // EIGHT))
