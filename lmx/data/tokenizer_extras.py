"""Tokenizers that need an optional extra: SentencePiece and tiktoken."""

import base64
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from lmx.data import cache
from lmx.data.tokenizer import END_OF_TEXT, SETTINGS, SPLIT, TextTokenizer, known_token, piece_bytes
from lmx.errors import UserError

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_O200K_UPPER, _O200K_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}*{_O200K_LOWER}+{_ENDINGS}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}+{_O200K_LOWER}*{_ENDINGS}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A tiktoken file holds neither its split pattern nor its special tokens: both go by the file's name.
# Source: tiktoken_ext/openai_public.py.
TIKTOKEN: dict[str, tuple[str, int | None]] = {
    "gpt2": (GPT2_SPLIT, 50256),
    "r50k_base": (GPT2_SPLIT, 50256),
    "p50k_base": (GPT2_SPLIT, 50256),
    "cl100k_base": (SPLIT, 100257),
    "o200k_base": (O200K_SPLIT, 199999),
}


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this tokenizer needs {module}: pip install 'lmx[{module}]'") from error


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece ``.model``, given by its content."""

    def __init__(self, model: bytes, end_token: str | None) -> None:
        self._processor = _extra("sentencepiece").SentencePieceProcessor(model_proto=model)
        self._model = model
        self.vocab_size = self._processor.get_piece_size()
        end = self._processor.eos_id() if end_token is None else self._processor.piece_to_id(end_token)
        absent = end < 0 or (end_token is not None and self._processor.id_to_piece(end) != end_token)
        self.end_id = known_token(None if absent else end, end_token or "</s>", self._controls())
        self.fingerprint = cache.digest("sentencepiece", model.hex(), self.end_id)

    def _controls(self) -> list[str]:
        processor = self._processor
        return [processor.id_to_piece(i) for i in range(self.vocab_size) if processor.is_control(i)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        return self._processor.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        """See :class:`TextTokenizer`."""
        return self._processor.decode([int(i) for i in ids])

    def token_bytes(self) -> np.ndarray:
        """See :class:`TextTokenizer`."""
        processor = self._processor
        special = [processor.is_control(i) or processor.is_unknown(i) for i in range(self.vocab_size)]
        pieces = [processor.id_to_piece(i) for i in range(self.vocab_size)]
        return np.array([0 if s else piece_bytes(p) for s, p in zip(special, pieces, strict=True)], np.int32)

    def save(self, directory: Path | str) -> None:
        """See :class:`TextTokenizer`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "tokenizer.model").write_bytes(self._model)
        cache.write_json(Path(directory) / SETTINGS, {"eos_token": self._processor.id_to_piece(self.end_id)})


class TiktokenTokenizer(TextTokenizer):
    """A tiktoken file (lines of base64 and rank), by its content; ``name`` chooses the split pattern."""

    def __init__(self, data: bytes, name: str, end_token: str | None) -> None:
        tiktoken = _extra("tiktoken")
        self._data, self._name, self._end_token = data, name, end_token or END_OF_TEXT
        ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in data.splitlines() if line)}
        pattern, end = TIKTOKEN.get(name, (SPLIT, None))
        self.end_id = max(ranks.values()) + 1 if end is None else end
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={self._end_token: self.end_id}
        )
        self.vocab_size = max(*ranks.values(), self.end_id) + 1
        self.fingerprint = cache.digest("tiktoken", data.hex(), pattern, self.end_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        return self._encoding.encode_ordinary_batch(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        """See :class:`TextTokenizer`."""
        return self._encoding.decode([int(i) for i in ids if i != self.end_id])

    def token_bytes(self) -> np.ndarray:
        """See :class:`TextTokenizer`."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token in self._encoding.token_byte_values():
            lengths[self._encoding.encode_single_token(token)] = len(token)
        return lengths

    def save(self, directory: Path | str) -> None:
        """See :class:`TextTokenizer`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "tokenizer.tiktoken").write_bytes(self._data)
        cache.write_json(Path(directory) / SETTINGS, {"eos_token": self._end_token, "tiktoken": self._name})


def is_tiktoken(data: bytes) -> bool:
    """Whether a file looks like lines of base64 and rank (Llama 3 ships one named tokenizer.model)."""
    first = data.split(b"\n", 1)[0].split()
    return len(first) == 2 and first[1].isdigit()
