"""What objectives ask of a tokenizer: its special tokens by name, and where words begin."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmx.data.framing import Frames, as_prompted
from lmx.data.tokenizer import CLS, MASK, SEP, TextTokenizer
from lmx.errors import UserError

OTHER_NAMES = {
    MASK: ("mask_token", "<mask>"),
    CLS: ("cls_token", "<s>"),
    SEP: ("sep_token", "</s>"),
    "<|fim_prefix|>": ("<fim_prefix>", "<fim-prefix>", "<PRE>", "▁<PRE>"),
    "<|fim_suffix|>": ("<fim_suffix>", "<fim-suffix>", "<SUF>", "▁<SUF>"),
    "<|fim_middle|>": ("<fim_middle>", "<fim-middle>", "<MID>", "▁<MID>"),
}
"""What tokenizers call a special token that we reserve by another name; a role first, where there is one."""


@dataclass(frozen=True)
class Vocabulary:
    """Token ids, as objectives see them.

    Attributes:
      size: ids are below it.
      end: ends a document.
      special: the ids of the special tokens that an objective needs, by its names for them.
      tokenizer: tells where words begin; None where every token is one.
    """

    size: int
    end: int
    special: Mapping[str, int] = field(default_factory=dict)
    tokenizer: TextTokenizer | None = None

    @classmethod
    def of(cls, tokenizer: TextTokenizer, names: Sequence[str]) -> "Vocabulary":
        """A tokenizer's.

        Raises:
          UserError: it lacks some of the special tokens ``names``.
        """
        found = {name: _find(tokenizer, name) for name in names}
        missing = [name for name, index in found.items() if index is None]
        if missing:
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise UserError(
                f"the tokenizer has no token for {shown}, which the objective needs: use a tokenizer that has them, or "
                "TrainedBpe, which reserves them"
            )
        special = {name: index for name, index in found.items() if index is not None}
        return cls(tokenizer.vocab_size, tokenizer.end_id, special, tokenizer)

    @classmethod
    def invented(cls, size: int, names: Sequence[str]) -> "Vocabulary":
        """One without text, for random tokens: the end is 0, and the special tokens come next."""
        return cls(size, 0, {name: index for index, name in enumerate(names, start=1)})

    def frames(self, *, before: bool) -> Frames:
        """What stands around texts and pairs of them: what the tokenizer puts there, or, if it puts nothing, its end
        token (``before`` them, or after)."""
        if self.tokenizer is not None:
            return Frames.of(as_prompted(self.tokenizer, before=before))
        if CLS in self.special and SEP in self.special:
            return Frames.bert(self.special[CLS], self.special[SEP])
        return Frames.plain(self.end)

    @functools.cached_property
    def _word_ends(self) -> tuple[np.ndarray, np.ndarray]:
        """bool [size] each: tokens that begin a word whatever comes before them, and tokens after which one begins."""
        begins, ends = np.ones(self.size, bool), np.ones(self.size, bool)
        if self.tokenizer is not None:
            # After a letter, because many decoders treat the first token of a text apart.
            before = self.tokenizer.encode("a")
            known = len(self.tokenizer.decode(before))
            for token in range(self.size):
                text = self.tokenizer.decode([*before, token])[known:]
                begins[token], ends[token] = not _in_word(text[:1]), not _in_word(text[-1:])
        return begins, ends

    def word_starts(self, tokens: np.ndarray) -> np.ndarray:
        """Where words begin: int [n] -> bool [n]."""
        begins, ends = self._word_ends
        starts = begins[tokens].copy()
        starts[1:] |= ends[tokens[:-1]]
        starts[:1] = True
        return starts


def _in_word(character: str) -> bool:
    """Whether a character is inside of words; U+FFFD is a part of one."""
    return character.isalnum() or character in ("_", "\ufffd")


def _find(tokenizer: TextTokenizer, name: str) -> int | None:
    others = OTHER_NAMES.get(name, ())
    names = [name, *(tokenizer.special_tokens.get(other, other) for other in others)]
    return next((index for n in names if (index := tokenizer.token_id(n)) is not None), None)
