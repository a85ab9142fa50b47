"""Marian's tokenizer: SentencePiece for each language, and one vocabulary of the pieces of both."""

import copy
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lmx.data import cache
from lmx.data.tokenizer import SETTINGS, Encoded, Spanned, Text, TextTokenizer, known_token, piece_bytes
from lmx.data.tokenizer_extras import extra, single
from lmx.errors import UserError

FILES = ("source.spm", "target.spm", "vocab.json")
UNKNOWN, PAD = "<unk>", "<pad>"
LANGUAGE = re.compile(r">>.+?<<")


class MarianTokenizer(TextTokenizer):
    """Texts become pieces of the source language; tokens become text of the target language.

    A text may begin with the language to translate to, as in ``>>fra<< Good morning.``

    Args:
      files: the content of each of ``FILES``.
      end_token: ends a text; ``</s>`` by default.
    """

    def __init__(self, files: dict[str, bytes], end_token: str | None) -> None:
        processor = extra("sentencepiece").SentencePieceProcessor
        self._files, self._end = files, end_token or "</s>"
        self._source, self._target = (processor(model_proto=files[name]) for name in FILES[:2])
        self._ids: dict[str, int] = json.loads(files["vocab.json"])
        self._pieces = {i: piece for piece, i in self._ids.items()}
        self.vocab_size = max(self._pieces) + 1
        self.end_id = known_token(self._ids.get(self._end), self._end, [UNKNOWN, PAD])
        self.fingerprint = cache.digest("marian", *(files[name].hex() for name in FILES), self._end)
        self.special_tokens = {"eos_token": self._end, "unk_token": UNKNOWN, "pad_token": PAD}

    @classmethod
    def of(cls, directory: Path, end_token: str | None = None) -> "MarianTokenizer":
        """That of a directory. Raises UserError if one of its files is missing."""
        missing = [name for name in FILES if not (directory / name).is_file()]
        if missing:
            raise UserError(f"{directory} has a part of a Marian tokenizer, but lacks {', '.join(missing)}")
        return cls({name: (directory / name).read_bytes() for name in FILES}, end_token)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        unknown = self._ids[UNKNOWN]
        return [[self._ids.get(p, unknown) for p in self._source.encode(text, out_type=str)] for text in texts]

    def encode_spans(self, texts: Sequence[str], *, special: bool = False) -> list[Spanned]:
        """See :class:`TextTokenizer`."""
        raise UserError("a Marian tokenizer has no places of its tokens in a text: use another for tags and answers")

    def encode_prompts(self, texts: Sequence[Text], *, around: bool = True) -> list[Encoded]:
        """See :class:`TextTokenizer`."""
        prompts = []
        for text in map(single, texts):
            language = LANGUAGE.match(text)
            code = [language[0]] if language else []
            rest = text[language.end() :] if language else text
            ids = [self._ids.get(c, self._ids[UNKNOWN]) for c in code] + self.encode(rest)
            ids += [self.end_id] * around
            prompts.append(Encoded(ids, [0] * len(ids)))
        return prompts

    def token_id(self, token: str) -> int | None:
        """See :class:`TextTokenizer`."""
        return self._ids.get(token)

    def with_end_token(self, *, before: bool) -> "MarianTokenizer":
        """See :class:`TextTokenizer`."""
        if before:
            raise UserError("a Marian tokenizer reads one language and writes another; a language model needs another")
        return self

    @property
    def of_targets(self) -> "MarianTokenizer":
        """The same for texts of the target language."""
        own = copy.copy(self)
        own._source = self._target
        return own

    def decode(self, ids: Iterable[int]) -> str:
        """See :class:`TextTokenizer`."""
        special = {self._end, UNKNOWN, PAD}
        pieces = [self._pieces.get(int(i), UNKNOWN) for i in ids]
        return self._target.decode([p for p in pieces if p not in special])

    def token_bytes(self) -> np.ndarray:
        """See :class:`TextTokenizer`."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for piece, index in self._ids.items():
            lengths[index] = 0 if piece in (self._end, UNKNOWN, PAD) else piece_bytes(piece)
        return lengths

    def save(self, directory: Path | str) -> None:
        """See :class:`TextTokenizer`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(directory) / name).write_bytes(content)
        cache.write_json(Path(directory) / SETTINGS, {"tokenizer_class": "MarianTokenizer", "eos_token": self._end})
