"""Tokenizers of the tokenizers library: a ``tokenizer.json``, and what transformers reads beside it."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from lmx.data import cache
from lmx.data.tokenizer import SETTINGS, Encoded, Spanned, Text, TextTokenizer, known_token, piece_bytes

AROUND = ("add_bos_token", "add_eos_token")
"""Settings that replace the post-processor, where they are there."""


class HuggingFaceTokenizer(TextTokenizer):
    """A ``tokenizer.json``, given by its content.

    Args:
      content: of the file.
      end_token: ends a document.
      settings: of ``tokenizer_config.json``: the special tokens by their roles, and what is put around prompts.
    """

    def __init__(self, content: str, end_token: str, settings: Mapping[str, Any] | None = None) -> None:
        self._content, self._end_token, self._settings = content, end_token, dict(settings or {})
        self._tokenizer = _opened(content)
        self._tokenizer.encode_special_tokens = True  # that is: as plain text
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.end_id = known_token(self.token_id(end_token), end_token, self._specials())
        self.fingerprint = cache.digest("tokenizer.json", content, end_token)
        self.special_tokens = {**roles(self._settings), "eos_token": end_token}

    @functools.cached_property
    def _for_prompts(self) -> Tokenizer:
        """One that takes special tokens in the text as such."""
        tokenizer = _opened(self._content)
        if any(key in self._settings for key in AROUND):
            start, end = (self.special_tokens.get(f"{key}_token") for key in ("bos", "eos"))
            start, end = (t if self._settings.get(k) else None for t, k in zip((start, end), AROUND, strict=True))
            tokenizer.post_processor = _template(tokenizer, start, end)
        return tokenizer

    def _specials(self) -> list[str]:
        return [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_spans(self, texts: Sequence[str], *, special: bool = False) -> list[Spanned]:
        """See :class:`TextTokenizer`."""
        tokenizer = self._for_prompts if special else self._tokenizer
        return [Spanned(e.ids, e.offsets) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode_prompts(self, texts: Sequence[Text], *, around: bool = True) -> list[Encoded]:
        """See :class:`TextTokenizer`."""
        found = self._for_prompts.encode_batch(list(texts), add_special_tokens=around)
        return [Encoded(e.ids, e.type_ids) for e in found]

    def token_id(self, token: str) -> int | None:
        """See :class:`TextTokenizer`."""
        return self._tokenizer.token_to_id(token)

    def with_end_token(self, *, before: bool) -> "HuggingFaceTokenizer":
        """See :class:`TextTokenizer`."""
        tokenizer = Tokenizer.from_str(self._content)
        around = (self._end_token, None) if before else (None, self._end_token)
        tokenizer.post_processor = _template(tokenizer, *around)
        settings = {**self._settings, **end_settings(self._end_token, before)}
        return HuggingFaceTokenizer(tokenizer.to_str(), self._end_token, settings)

    def decode(self, ids: Iterable[int]) -> str:
        """See :class:`TextTokenizer`."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """See :class:`TextTokenizer`."""
        byte_level = '"type":"ByteLevel"' in json.dumps(json.loads(self._content)["decoder"], separators=(",", ":"))
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            lengths[index] = len(token) if byte_level else piece_bytes(token)
        for index, added in self._tokenizer.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths

    def save(self, directory: Path | str) -> None:
        """See :class:`TextTokenizer`; the files are those of a Hugging Face model."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "tokenizer.json").write_text(self._content, encoding="utf-8")
        around = {key: self._settings[key] for key in AROUND if key in self._settings}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **roles(self._settings), **around}
        cache.write_json(Path(directory) / SETTINGS, {**settings, "eos_token": self._end_token})


def roles(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens among a ``tokenizer_config.json``'s entries, by their roles."""
    return {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)}


def end_settings(end_token: str, before: bool) -> dict[str, Any]:
    """The entries of ``tokenizer_config.json`` that put the end token alone before prompts, or after them."""
    start = {"bos_token": end_token} if before else {}
    return {**start, "add_bos_token": before, "add_eos_token": not before}


def _opened(content: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(content)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _template(tokenizer: Tokenizer, start: str | None, end: str | None) -> processors.TemplateProcessing:
    """A post-processor that puts one token before and one after each text."""
    first = [*([start] if start else []), "$A", *([end] if end else [])]
    second = [piece.replace("$A", "$B") + ":1" for piece in first]
    tokens = [(token, tokenizer.token_to_id(token)) for token in (start, end) if token]
    return processors.TemplateProcessing(
        single=first, pair=[*first, *second], special_tokens=list(dict(tokens).items())
    )
