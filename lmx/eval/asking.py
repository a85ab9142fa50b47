"""How each kind of model is asked for the probability of a continuation: what becomes of its text, in which rows."""

import abc
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from lmx.data.tokenizer import TextTokenizer
from lmx.decode.forward import is_encoder
from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.eval.likelihood import Read, Scorer
from lmx.objectives.vocabulary import Vocabulary

MASK = "[MASK]"


class TargetTooLong(UserError):
    """A continuation that alone exceeds the model's context, however much is cut of what stands before it."""


@dataclass(frozen=True)
class Pair:
    """A continuation and what it is conditioned on, in tokens.

    Attributes:
      before: special tokens in front; they are kept however much of the context is cut.
      context: may be cut from its front.
      target: the continuation, whose probability is wanted.
      after: special tokens behind.
      cut: how many tokens were cut from the context to fit the model.
    """

    before: tuple[int, ...]
    context: tuple[int, ...]
    target: tuple[int, ...]
    after: tuple[int, ...] = ()
    cut: int = 0

    @property
    def size(self) -> int:
        """All its tokens."""
        return len(self.before) + len(self.context) + len(self.target) + len(self.after)


class Likelihood(NamedTuple):
    """The natural log-probability of a continuation, whether each of its tokens is the arg-max, and their number.

    Of an encoder it is the pseudo-log-likelihood: each token given all others (Salazar et al. 2020)."""

    logprob: float
    greedy: bool
    tokens: int


@dataclass(frozen=True)
class Asking(abc.ABC):
    """Base class. ``tokenizer``, the longest row ``room``, and ``opening``, the token that a text begins with (or
    that stands for a beginning where nothing is given)."""

    tokenizer: TextTokenizer
    room: int
    opening: int

    def pair(self, context: str, continuation: str) -> Pair:
        """The tokens of a continuation after a context (which may be empty).

        Blanks at the end of the context go to the continuation, as tokenizers put them before a word.

        Raises:
          UserError: the continuation has no tokens of its own.
          TargetTooLong: it exceeds the model's context.
        """
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        before, target = self.parted(context, continuation)
        if not target:
            raise UserError(
                f"the continuation {continuation!r} has no tokens of its own after {context[-40:]!r}; give a choice "
                "that adds text"
            )
        return self.fitted(self._pair(context, before, target))

    def parted(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens of both, as one text: where the context's own tokens end, the continuation begins."""
        whole, start = self.plain(context + continuation), len(self.plain(context)) if context else 0
        return whole[:start], whole[start:]

    def plain(self, text: str) -> tuple[int, ...]:
        """A text's tokens, special ones in it taken as such, and none put around it."""
        return tuple(self.tokenizer.encode_prompts([text], around=False)[0].ids)

    def fitted(self, pair: Pair) -> Pair:
        """The pair with its context cut from the front until the model has room.

        Raises:
          TargetTooLong: the continuation alone is too long.
        """
        excess = max(0, self.excess(pair))
        if excess and excess > len(pair.context) - self.least(pair):
            raise TargetTooLong(
                f"a continuation has {len(pair.target)} tokens and {len(pair.before) + len(pair.after)} around it, "
                f"which exceed the model's context of {self.room}"
            )
        return replace(pair, context=pair.context[excess:], cut=pair.cut + excess)

    def least(self, pair: Pair) -> int:
        """How many tokens of its context a pair cannot do without: the continuation is predicted from something."""
        return int(not (pair.before or pair.after))

    @abc.abstractmethod
    def _pair(self, context: str, before: tuple[int, ...], target: tuple[int, ...]) -> Pair:
        """The pair of a context, its tokens, and those of the continuation."""

    @abc.abstractmethod
    def excess(self, pair: Pair) -> int:
        """By how many tokens the pair is too long, negative where there is room left."""

    @abc.abstractmethod
    def reads(self, pair: Pair) -> list[Read]:
        """The rows in which the target's tokens are predicted, in their order."""


class AskDecoder(Asking):
    """A decoder reads the context and the continuation, and predicts each token of the latter from those before."""

    def _pair(self, context: str, before: tuple[int, ...], target: tuple[int, ...]) -> Pair:
        return Pair((self.opening,) if self.starts or not before else (), before, target)

    @functools.cached_property
    def starts(self) -> bool:
        """Whether every text begins with the opening token."""
        return self.tokenizer.start_id is not None

    def excess(self, pair: Pair) -> int:
        """The last token is predicted, not read."""
        return pair.size - 1 - self.room

    def reads(self, pair: Pair) -> list[Read]:
        """One row."""
        tokens = (*pair.before, *pair.context, *pair.target)[:-1]
        first = len(tokens) - len(pair.target)
        return [Read(tokens, tuple(range(first, len(tokens))), pair.target)]


class AskPrefix(Asking):
    """A decoder that learned to go on with a prefix reads the context as one, all of which sees all of it, and nothing
    before it, as when it generates."""

    def _pair(self, context: str, before: tuple[int, ...], target: tuple[int, ...]) -> Pair:
        return Pair((), before, target, () if before else (self.opening,))

    def excess(self, pair: Pair) -> int:
        """The last token is predicted, not read."""
        return pair.size - 1 - self.room

    def reads(self, pair: Pair) -> list[Read]:
        """One row."""
        prefix = (*pair.before, *pair.context, *pair.after)
        tokens = (*prefix, *pair.target[:-1])
        return [Read(tokens, tuple(range(len(prefix) - 1, len(tokens))), pair.target, prefix=len(prefix))]


@dataclass(frozen=True)
class AskSource(Asking):
    """Base class: the context is a source, and the continuation a target: two texts, tokenized apart. ``encode`` gives
    what the model reads of a source, special tokens around it included, as when it generates."""

    encode: Callable[[str], list[int]]

    def parted(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens of either."""
        target = self.tokenizer.of_targets.encode_prompts([continuation], around=False)[0]
        return self.plain(context), tuple(target.ids)

    def _pair(self, context: str, before: tuple[int, ...], target: tuple[int, ...]) -> Pair:
        ids = tuple(self.encode(context))
        first = _place(ids, before)
        return Pair(ids[:first], before, target, ids[first + len(before) :])


class AskPrefixSource(AskSource, AskPrefix):
    """A decoder that learned to write a target after a source that has ended."""


class AskEncoderDecoder(AskSource):
    """The encoder reads the context, and the decoder predicts the continuation. ``opening`` starts the decoder."""

    def excess(self, pair: Pair) -> int:
        """Of what the encoder reads; or of the continuation, which cutting the context does not help."""
        source = len(pair.before) + len(pair.context) + len(pair.after) - self.room
        return source if len(pair.target) <= self.room else len(pair.target) + len(pair.context)

    def reads(self, pair: Pair) -> list[Read]:
        """One row."""
        tokens = (self.opening, *pair.target[:-1])
        source = (*pair.before, *pair.context, *pair.after)
        return [Read(tokens, tuple(range(len(tokens))), pair.target, source)]


@dataclass(frozen=True)
class AskEncoder(Asking):
    """An encoder predicts each token of the continuation where that token alone is masked."""

    mask: int = 0

    def _pair(self, context: str, before: tuple[int, ...], target: tuple[int, ...]) -> Pair:
        around = self.tokenizer.encode_prompts(["a"])[0].ids
        first = _place(around, self.plain("a"))
        return Pair(tuple(around[:first]), before, target, tuple(around[first + len(self.plain("a")) :]))

    def excess(self, pair: Pair) -> int:
        """Of all that is read."""
        return pair.size - self.room

    def least(self, pair: Pair) -> int:
        """None: a token is predicted from what stands around it."""
        return 0

    def reads(self, pair: Pair) -> list[Read]:
        """One row for each token."""
        tokens = (*pair.before, *pair.context, *pair.target, *pair.after)
        first = len(pair.before) + len(pair.context)
        return [self.masked(tokens, first + i) for i in range(len(pair.target))]

    def masked(self, tokens: Sequence[int], at: int) -> Read:
        """The row in which the token at one place is masked and predicted."""
        return Read((*tokens[:at], self.mask, *tokens[at + 1 :]), (at,), (tokens[at],))


def asking(model: Model) -> Asking:
    """How this model is asked.

    Raises:
      UserError: it has no tokenizer, no head that predicts tokens, or, an encoder, no mask token.
    """
    tokenizer, spec = model.tokenizer, model.spec
    if tokenizer is None:
        raise UserError("this model has no tokenizer, so it cannot be asked about texts; put one into its directory")
    if spec.head is None:
        raise UserError(f"this {model.config.family} has no head that predicts tokens, so texts have no likelihood")
    if spec.encoder is not None:
        return AskEncoderDecoder(tokenizer, spec.context, spec.encoder.decoder_start, model.prompts.encode)
    if is_encoder(spec):
        mask = Vocabulary.of(tokenizer, [MASK]).special[MASK]
        return AskEncoder(tokenizer, spec.context, tokenizer.end_id, mask)
    return _asking_decoder(model, tokenizer)


def _asking_decoder(model: Model, tokenizer: TextTokenizer) -> Asking:
    room, start = model.spec.context, tokenizer.start_id
    opening = model.defaults.tokens.get("bos", tokenizer.end_id)
    if not model.reads_prefix:
        return AskDecoder(tokenizer, room, opening if start is None else start)
    if model.prompts.bare:
        return AskPrefix(tokenizer, room, opening)
    return AskPrefixSource(tokenizer, room, opening, model.prompts.encode)


def reads_texts(way: Asking, name: str) -> AskDecoder:
    """The way of a model that predicts whole texts, each token from those before it; ``name`` is the model's.

    Raises:
      UserError: another kind of model.
    """
    if isinstance(way, AskPrefix):
        raise UserError(
            f"this {name} learned to go on with a prefix that sees all of itself, so a whole text has no likelihood "
            "token by token; score its own rows (lmx eval without --stride) or continuations (--tasks)"
        )
    if not isinstance(way, AskDecoder):
        raise UserError(f"this {name} does not predict the next token of a text; only decoders do")
    return way


def likelihoods(scorer: Scorer, way: Asking, pairs: Sequence[Pair]) -> list[Likelihood]:
    """The likelihood of each pair's target."""
    reads = [way.reads(pair) for pair in pairs]
    scores = iter(scorer.read([read for own in reads for read in own]))
    return [_summed([next(scores) for _ in own]) for own in reads]


def _summed(scores: Sequence[tuple[np.ndarray, np.ndarray]]) -> Likelihood:
    logprobs, best = (np.concatenate(column) for column in zip(*scores, strict=True))
    return Likelihood(float(logprobs.sum(dtype=np.float64)), bool(best.all()), len(logprobs))


def _place(whole: Sequence[int], part: Sequence[int]) -> int:
    """Where a text's own tokens begin among those with special tokens around; at the end if they are not there."""
    whole, part = list(whole), list(part)
    starts = range(len(whole) - len(part) + 1)
    return next((i for i in starts if whole[i : i + len(part)] == part), len(whole) - len(part))
