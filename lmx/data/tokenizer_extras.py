"""Tokenizers that need an optional extra: SentencePiece; tiktoken is in :mod:`lmx.data.tokenizer_tiktoken`."""

import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lmx.data import cache
from lmx.data.tokenizer import SETTINGS, Encoded, Spanned, Text, TextTokenizer, known_token, piece_bytes
from lmx.data.tokenizer_json import end_settings, roles
from lmx.errors import UserError


def extra(module: str) -> ModuleType:
    """An optional module. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this tokenizer needs {module}: pip install 'lmx[{module}]'") from error


def single(text: Text) -> str:
    """The text. Raises UserError if it is a pair."""
    if isinstance(text, str):
        return text
    raise UserError(f"this tokenizer reads single texts, but was given the pair {text!r}")


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece ``.model``, given by its content.

    Args:
      model: the file.
      end_token: ends a document; None takes the model's own.
      settings: of ``tokenizer_config.json``: ``add_bos_token`` and ``add_eos_token`` say what is put around prompts;
        ``extra_ids`` how many tokens ``<extra_id_I>`` come after the model's (T5), and ``added_tokens_decoder`` others.
    """

    def __init__(self, model: bytes, end_token: str | None, settings: Mapping[str, Any] | None = None) -> None:
        self._processor = extra("sentencepiece").SentencePieceProcessor(model_proto=model)
        self._model, self._settings = model, dict(settings or {})
        self._pieces = self._processor.get_piece_size()
        self._added = self._read_added()
        self.vocab_size = max([self._pieces - 1, *self._added.values()]) + 1
        end = self._processor.eos_id() if end_token is None else self._processor.piece_to_id(end_token)
        absent = end < 0 or (end_token is not None and self._processor.id_to_piece(end) != end_token)
        self.end_id = known_token(None if absent else end, end_token or "</s>", self._controls())
        self.fingerprint = cache.digest("sentencepiece", model.hex(), self.end_id)
        end, start = self._processor.id_to_piece(self.end_id), self._processor.bos_id()
        first = {"bos_token": self._processor.id_to_piece(start)} if start >= 0 else {}
        self.special_tokens = {**first, **roles(self._settings), "eos_token": end}

    def _read_added(self) -> dict[str, int]:
        count = int(self._settings.get("extra_ids", 0))
        added = {f"<extra_id_{i}>": self._pieces + count - 1 - i for i in range(count)}
        for index, token in self._settings.get("added_tokens_decoder", {}).items():
            added[token["content"]] = int(index)
        return added

    def _controls(self) -> list[str]:
        processor = self._processor
        return [processor.id_to_piece(i) for i in range(self._pieces) if processor.is_control(i)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        return self._processor.encode(list(texts))

    def encode_spans(self, texts: Sequence[str], *, special: bool = False) -> list[Spanned]:
        """See :class:`TextTokenizer`."""
        return [self._spanned(text, self._specials() if special else {}) for text in texts]

    def _spanned(self, text: str, specials: Mapping[str, int]) -> Spanned:
        ids, spans, at = list[int](), list[tuple[int, int]](), 0
        for part in _parts(text, specials):
            if part in specials:
                ids, spans = [*ids, specials[part]], [*spans, (at, at + len(part))]
            else:
                pieces = self._processor.encode(part, out_type="immutable_proto").pieces
                ids += [piece.id for piece in pieces]
                spans += [(at + piece.begin, at + piece.end) for piece in pieces]
            at += len(part)
        return Spanned(ids, spans)

    def _specials(self) -> dict[str, int]:
        return {**{p: self._processor.piece_to_id(p) for p in self._controls()}, **self._added}

    def encode_prompts(self, texts: Sequence[Text], *, around: bool = True) -> list[Encoded]:
        """See :class:`TextTokenizer`."""
        specials = self._specials()
        start, end = (self._around(role) if around else [] for role in ("bos", "eos"))
        prompts = []
        for text in map(single, texts):
            ids = [*start, *_with_specials(text, specials, self.encode), *end]
            prompts.append(Encoded(ids, [0] * len(ids)))
        return prompts

    def _around(self, role: str) -> list[int]:
        token = self.special_tokens.get(f"{role}_token")
        index = None if token is None or not self._settings.get(f"add_{role}_token") else self.token_id(token)
        return [] if index is None else [index]

    def token_id(self, token: str) -> int | None:
        """See :class:`TextTokenizer`."""
        if token in self._added:
            return self._added[token]
        index = self._processor.piece_to_id(token)
        return index if self._processor.id_to_piece(index) == token else None

    def with_end_token(self, *, before: bool) -> "SentencePieceTokenizer":
        """See :class:`TextTokenizer`."""
        end = self._processor.id_to_piece(self.end_id)
        return SentencePieceTokenizer(self._model, end, {**self._settings, **end_settings(end, before)})

    def decode(self, ids: Iterable[int]) -> str:
        """See :class:`TextTokenizer`."""
        return self._processor.decode([int(i) for i in ids if i < self._pieces])

    def token_bytes(self) -> np.ndarray:
        """See :class:`TextTokenizer`."""
        processor = self._processor
        lengths = np.zeros(self.vocab_size, np.int32)
        for i in range(self._pieces):
            if not (processor.is_control(i) or processor.is_unknown(i)):
                lengths[i] = piece_bytes(processor.id_to_piece(i))
        return lengths

    def save(self, directory: Path | str) -> None:
        """See :class:`TextTokenizer`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "tokenizer.model").write_bytes(self._model)
        end = {"eos_token": self._processor.id_to_piece(self.end_id)}
        cache.write_json(Path(directory) / SETTINGS, {**self._settings, **end})


def _with_specials(text: str, specials: Mapping[str, int], encode: Callable[[str], list[int]]) -> list[int]:
    """The tokens of a text in which special tokens stand for themselves."""
    parts = _parts(text, specials)
    return [i for part in parts for i in ([specials[part]] if part in specials else encode(part))]


def _parts(text: str, specials: Mapping[str, int]) -> list[str]:
    """The text cut at its special tokens, which are parts of their own."""
    if not specials:
        return [text]
    longest_first = sorted(specials, key=len, reverse=True)
    return [part for part in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if part]
