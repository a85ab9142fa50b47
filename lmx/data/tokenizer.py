"""Tokenizers: one interface over tokenizer.json, SentencePiece and tiktoken; training a byte-level BPE.

A tokenizer never adds special tokens by itself, and never reads one out of text: the words "<|endoftext|>"
in a document are text. ``end_id`` marks the boundary of documents and the end of what is generated.
"""

import abc
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmx.data import cache
from lmx.data.config import TokenizerFile
from lmx.errors import UserError

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (
    END_OF_TEXT,
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[SEP]",
)
BATCH_BYTES = 1 << 20
SETTINGS = "tokenizer_config.json"
# Words with one leading space, up to three digits, runs of punctuation, newlines apart from indentation: the
# pattern of cl100k_base, which suits code better than that of GPT-2.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


class TextTokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
      vocab_size: the number of token ids, special tokens included; ids are below it.
      end_id: the token that ends a document.
      fingerprint: a hash of all that decides which tokens a text becomes.
    """

    vocab_size: int
    end_id: int
    fingerprint: str

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without special tokens; on all cores."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens give none, bytes that are not UTF-8 give U+FFFD."""

    @abc.abstractmethod
    def token_bytes(self) -> np.ndarray:
        """How many bytes of UTF-8 each token stands for, int32 ``[vocab_size]``; 0 for special tokens."""

    @abc.abstractmethod
    def save(self, directory: Path | str) -> None:
        """Writes files into ``directory`` from which :func:`load_tokenizer` makes the same tokenizer."""


class HuggingFaceTokenizer(TextTokenizer):
    """A ``tokenizer.json``, given by its content."""

    def __init__(self, content: str, end_token: str) -> None:
        from tokenizers import Tokenizer

        self._content, self._end_token = content, end_token
        self._tokenizer = Tokenizer.from_str(content)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # that is: as plain text
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.end_id = known_token(self._tokenizer.token_to_id(end_token), end_token, self._specials())
        self.fingerprint = cache.digest("tokenizer.json", content, end_token)

    def _specials(self) -> list[str]:
        return [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

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
        cache.write_json(
            Path(directory) / SETTINGS,
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._end_token},
        )


def piece_bytes(piece: str) -> int:
    """Bytes of a SentencePiece or WordPiece token: "▁" is a space, "<0x0A>" one byte, "##" no text."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.removeprefix("##").replace("▁", " ").encode())


def known_token(index: int | None, token: str, specials: Iterable[str]) -> int:
    """``index``, unless it is None.

    Raises:
      UserError: it is None: the tokenizer does not have ``token``.
    """
    if index is None:
        raise UserError(
            f"the tokenizer has no token {token!r}; its special tokens are {', '.join(specials) or 'none'}: "
            "set end_token to one that ends a document"
        )
    return index


class TextStream:
    """Turns tokens into text as they come, holding back the bytes of characters that are not complete yet."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens whose text is out; some decoders treat the first token apart
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that ``token`` completes; often empty."""
        self._held.append(int(token))
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._held) < 8:
            return ""
        self._context, self._held = self._held, []
        return text

    def flush(self) -> str:
        """The text of what was held back, with U+FFFD for bytes that make no character."""
        text = self._new_text()
        self._context, self._held = [], []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._held)[len(before) :]


def train_bpe(texts: Iterator[str], vocab_size: int, *, progress: bool = False) -> TextTokenizer:
    """A byte-level BPE with the special token ``<|endoftext|>``; the same texts give the same tokenizer.

    Raises:
      UserError: ``vocab_size`` has no room for the 256 bytes and the end of text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"vocab_size is {vocab_size}, expected at least 257 (256 bytes and the end of text)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(tokenizer.to_str(), END_OF_TEXT)


def open_tokenizer(config: TokenizerFile) -> TextTokenizer:
    """The tokenizer of a file, or of the directory of a Hugging Face model.

    Raises:
      UserError: the file is missing or not a tokenizer, its extra is not installed, or no end token is known.
    """
    path = Path(config.path).expanduser()
    if not config.path or not path.exists():
        raise UserError(
            f"there is no tokenizer file {config.path!r}: set path to a tokenizer.json, .model or .tiktoken"
        )
    if path.is_dir():
        return load_tokenizer(path, config.end_token)
    try:
        return _open_file(path, config.end_token)
    except UserError:
        raise
    except Exception as error:  # the three libraries raise bare Exception, RuntimeError and ValueError
        raise UserError(f"{path} is not a tokenizer that can be read: {error}") from error


def load_tokenizer(directory: Path | str, end_token: str | None = None) -> TextTokenizer:
    """The tokenizer in a directory: a run's, or that of a Hugging Face model.

    Raises:
      UserError: there is none.
    """
    names = ("tokenizer.json", "tokenizer.tiktoken", "tokenizer.model")
    for file in (Path(directory) / name for name in names):
        if file.exists():
            return open_tokenizer(TokenizerFile(path=str(file), end_token=end_token))
    raise UserError(f"{directory} has no tokenizer: expected one of {', '.join(names)}")


def _open_file(path: Path, end_token: str | None) -> TextTokenizer:
    settings = _settings(path.parent)
    end_token = end_token or settings.get("eos_token")
    if path.suffix == ".json":
        content = path.read_text(encoding="utf-8")
        return HuggingFaceTokenizer(content, end_token or _guessed_end(content, path))
    from lmx.data import tokenizer_extras

    data = path.read_bytes()
    if path.suffix == ".tiktoken" or tokenizer_extras.is_tiktoken(data):
        return tokenizer_extras.TiktokenTokenizer(data, settings.get("tiktoken", path.stem), end_token)
    return tokenizer_extras.SentencePieceTokenizer(data, end_token)


def _settings(directory: Path) -> dict[str, Any]:
    file = directory / SETTINGS
    settings = cache.read_json(file) if file.exists() else {}
    end = settings.get("eos_token")
    return settings | {"eos_token": end.get("content") if isinstance(end, dict) else end}


def _guessed_end(content: str, path: Path) -> str:
    data = json.loads(content)
    tokens = [t["content"] for t in data.get("added_tokens", []) if t.get("special")]
    for token in KNOWN_ENDS:
        if token in tokens:
            return token
    raise UserError(
        f"{path} does not say which token ends a document; its special tokens are "
        f"{', '.join(tokens) or 'none'}: "
        "set end_token to one of them"
    )
