"""What stands around the texts that a model reads: the special tokens that its tokenizer puts there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmx.data.tokenizer import TextTokenizer
from lmx.errors import UserError


class Framed(NamedTuple):
    """Tokens int32 [n] of one or two texts with what stands around them, their types int32 [n], and where each text
    begins."""

    tokens: np.ndarray
    types: np.ndarray
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Frame:
    """Special tokens before the first text, between two, and after the last, with their types; and the texts' types."""

    tokens: tuple[tuple[int, ...], ...]
    types: tuple[tuple[int, ...], ...]
    text_types: tuple[int, ...]

    @classmethod
    def plain(cls, end: int, texts: int) -> "Frame":
        """The end token before each text."""
        return cls(((end,),) * texts + ((),), (*((i,) for i in range(texts)), ()), tuple(range(texts)))

    @classmethod
    def of(cls, tokenizer: TextTokenizer, texts: int) -> "Frame":
        """What a tokenizer puts around a text, or a pair of them.

        Raises:
          UserError: a pair, of a tokenizer that reads single texts.
        """
        names = ("a", "b")[:texts]
        prompt = tokenizer.encode_prompts([names if texts == 2 else "a"])[0]  # type: ignore[list-item]
        tokens, types, own_types, at = [], [], [], 0
        for name in names:
            own = tokenizer.encode_prompts([name], around=False)[0].ids
            first = next(i for i in range(at, len(prompt.ids)) if prompt.ids[i : i + len(own)] == own)
            tokens.append(tuple(prompt.ids[at:first]))
            types.append(tuple(prompt.types[at:first]))
            own_types.append(prompt.types[first])
            at = first + len(own)
        tokens.append(tuple(prompt.ids[at:]))
        return cls(tuple(tokens), (*types, tuple(prompt.types[at:])), tuple(own_types))

    @property
    def extra(self) -> int:
        """How many special tokens."""
        return sum(map(len, self.tokens))

    def around(self, texts: Sequence[np.ndarray]) -> Framed:
        """The texts in their frame."""
        parts, types, starts, at = [], [], [], 0
        for index, text in enumerate([*texts, np.zeros(0, np.int32)]):
            parts += [np.array(self.tokens[index], np.int32), text]
            own = self.text_types[index] if index < len(texts) else 0
            types += [np.array(self.types[index], np.int32), np.full(len(text), own, np.int32)]
            starts.append(at + len(self.tokens[index]))
            at = starts[-1] + len(text)
        return Framed(np.concatenate(parts), np.concatenate(types), tuple(starts[: len(texts)]))


@dataclass(frozen=True)
class Frames:
    """Those of single texts and of pairs; None where pairs are not read."""

    single: Frame
    pair: Frame | None

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> "Frames":
        """A tokenizer's."""
        try:
            return cls(Frame.of(tokenizer, 1), Frame.of(tokenizer, 2))
        except UserError:  # it reads single texts
            return cls(Frame.of(tokenizer, 1), None)

    @classmethod
    def plain(cls, end: int) -> "Frames":
        """The end token before each text."""
        return cls(Frame.plain(end, 1), Frame.plain(end, 2))

    @classmethod
    def bert(cls, start: int, end: int) -> "Frames":
        """``start a end``, and ``start a end b end`` with the type 1 from b on (Devlin et al. 2018, figure 2)."""
        single = Frame(((start,), (end,)), ((0,), (0,)), (0,))
        return cls(single, Frame(((start,), (end,), (end,)), ((0,), (0,), (1,)), (0, 1)))

    def of_pairs(self) -> Frame:
        """That of pairs. Raises UserError if they are not read."""
        if self.pair is None:
            raise UserError(
                "the tokenizer reads single texts, but the examples are pairs of texts: use a tokenizer.json"
            )
        return self.pair

    def extra(self, second: np.ndarray) -> np.ndarray:
        """How many special tokens each example takes, by the tokens of its second text: int [examples]."""
        is_pair = np.asarray(second) > 0
        return np.where(is_pair, self.of_pairs().extra if is_pair.any() else 0, self.single.extra)


def as_prompted(tokenizer: TextTokenizer, *, before: bool) -> TextTokenizer:
    """The tokenizer with what is put around the texts of labelled examples: what it puts there itself, or, if it puts
    nothing, its end token (``before`` them, or after)."""
    with_it, without = (tokenizer.encode_prompts(["a"], around=around)[0].ids for around in (True, False))
    return tokenizer if len(with_it) > len(without) else tokenizer.with_end_token(before=before)
