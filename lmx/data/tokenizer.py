"""Tokenizers: one interface over tokenizer.json, SentencePiece and tiktoken; training a byte-level BPE.

Documents are encoded without special tokens, and none is read out of text: the words "<|endoftext|>" in a document
are text. ``end_id`` marks the boundary of documents and the end of what is generated. Prompts are encoded as the model
that the tokenizer came with reads them: with what its post-processor puts around them, and with special tokens in the
text as what they stand for.
"""

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmx.data.config import TokenizerFile
from lmx.errors import UserError

END_OF_TEXT = "<|endoftext|>"
MASK, CLS, SEP = "[MASK]", "[CLS]", "[SEP]"
ROLES = {"mask_token": MASK, "cls_token": CLS, "sep_token": SEP}
"""What transformers calls the special tokens that encoders need, and what they are called in a trained tokenizer."""
KNOWN_ENDS = (
    END_OF_TEXT,
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    SEP,
)
BATCH_BYTES = 1 << 20
SETTINGS = "tokenizer_config.json"
FILES = (
    *("tokenizer.json", "tokenizer.tiktoken", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("source.spm", "vocab.txt", "vocab.json"),
)
"""What a tokenizer is read from, the first of these that is there."""
# Words with one leading space, up to three digits, runs of punctuation, newlines apart from indentation: the
# pattern of cl100k_base, which suits code better than that of GPT-2.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


Text = str | tuple[str, str]
"""A text, or a pair of texts for models that read two."""


class Encoded(NamedTuple):
    """A prompt: its token ids, and for each token which text of a pair it belongs to, as the tokenizer counts."""

    ids: list[int]
    types: list[int]


class Spanned(NamedTuple):
    """A text's token ids, and the characters [start, end) that each stands for, maybe a space before it among them."""

    ids: list[int]
    spans: list[tuple[int, int]]


class TextTokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
      vocab_size: the number of token ids, special tokens included; ids are below it.
      end_id: the token that ends a document.
      fingerprint: a hash of all that decides which tokens a document becomes.
      special_tokens: the special tokens that have a role, by its name: ``bos_token``, ``eos_token``, ``pad_token``, ...
    """

    vocab_size: int
    end_id: int
    fingerprint: str
    special_tokens: Mapping[str, str]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without special tokens; on all cores."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_spans(self, texts: Sequence[str], *, special: bool = False) -> list[Spanned]:
        """The token ids of each text, with the characters that they stand for.

        Args:
          texts: what to encode.
          special: whether special tokens in the text are taken as such, as :meth:`encode_prompts` does.

        Raises:
          UserError: a tokenizer that does not know.
        """

    @abc.abstractmethod
    def encode_prompts(self, texts: Sequence[Text], *, around: bool = True) -> list[Encoded]:
        """The tokens of each text or pair as a model reads a prompt: special tokens in the text are taken as such.

        Args:
          texts: what to encode.
          around: whether special tokens are put around it; a rendered chat brings its own.

        Raises:
          UserError: a pair, of a tokenizer that reads single texts.
        """

    @abc.abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token, special or not; None if there is no such token."""

    @abc.abstractmethod
    def with_end_token(self, *, before: bool) -> "TextTokenizer":
        """The same, but what is put around prompts is the end token alone, before them (where models that were trained
        on packed documents saw that of another document) or after them.

        Raises:
          UserError: a tokenizer of pairs of languages, whose prompts have one form.
        """

    @property
    def of_targets(self) -> "TextTokenizer":
        """The tokenizer of what is written after a source: this one, unless languages have one each."""
        return self

    @property
    def start_id(self) -> int | None:
        """The special token that prompts begin with; None if they begin with their text."""
        (prompt,), text = self.encode_prompts(["a"]), self.encode("a")
        return prompt.ids[0] if prompt.ids[:1] != text[:1] else None

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens give none, bytes that are not UTF-8 give U+FFFD."""

    @abc.abstractmethod
    def token_bytes(self) -> np.ndarray:
        """How many bytes of UTF-8 each token stands for, int32 ``[vocab_size]``; 0 for special tokens."""

    @abc.abstractmethod
    def save(self, directory: Path | str) -> None:
        """Writes files into ``directory`` from which :func:`load_tokenizer` makes the same tokenizer."""


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


def train_bpe(
    texts: Iterator[str], vocab_size: int, special_tokens: Sequence[str] = (), *, progress: bool = False
) -> TextTokenizer:
    """A byte-level BPE with the special token ``<|endoftext|>``, then ``special_tokens``; the same texts give the same.

    With [CLS] and [SEP] among them, it puts these around texts and pairs, as BERT's does; with none, nothing.

    Raises:
      UserError: ``vocab_size`` has no room for the 256 bytes and the special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from lmx.data.tokenizer_json import HuggingFaceTokenizer

    if vocab_size < 257 + len(special_tokens):
        more = f" and {len(special_tokens)} special tokens" if special_tokens else ""
        raise UserError(
            f"vocab_size is {vocab_size}, expected at least {257 + len(special_tokens)} (256 bytes and the end of "
            f"text{more})"
        )
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
        special_tokens=[END_OF_TEXT, *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    known = {role: token for role, token in ROLES.items() if token in special_tokens}
    if CLS in special_tokens and SEP in special_tokens:
        ids = [(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)]
        single, pair = f"{CLS} $A {SEP}", f"{CLS} $A {SEP} $B:1 {SEP}:1"
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return HuggingFaceTokenizer(tokenizer.to_str(), END_OF_TEXT, known)


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
    path = _file_in(path) if path.is_dir() else path
    try:
        return _open_file(path, replace(config, path=str(path)))
    except UserError:
        raise
    except Exception as error:  # the three libraries raise bare Exception, RuntimeError and ValueError
        raise UserError(f"{path} is not a tokenizer that can be read: {error}") from error


def load_tokenizer(directory: Path | str) -> TextTokenizer:
    """The tokenizer in a directory: a run's, or that of a Hugging Face model.

    Raises:
      UserError: there is none.
    """
    return open_tokenizer(TokenizerFile(path=str(_file_in(directory))))


def _file_in(directory: Path | str) -> Path:
    file = tokenizer_file(directory)
    if file is None:
        raise UserError(f"{directory} has no tokenizer: expected one of {', '.join(FILES)}")
    return file


def tokenizer_file(directory: Path | str) -> Path | None:
    """The file in a directory that says what the tokenizer is; None if there is none."""
    return next((Path(directory) / name for name in FILES if (Path(directory) / name).is_file()), None)


def _open_file(path: Path, config: TokenizerFile) -> TextTokenizer:
    from lmx.data import tokenizer_extras, tokenizer_files, tokenizer_tiktoken

    settings = tokenizer_files.read_settings(path.parent)
    end_token = config.end_token or settings.get("eos_token")
    if tokenizer_tiktoken.is_tiktoken(path):
        return tokenizer_tiktoken.TiktokenTokenizer(path.read_bytes(), config, end_token, settings)
    if config.pattern or config.special_tokens:
        raise UserError(f"{path} is no tiktoken file and has its own pattern and special_tokens: unset those given")
    if path.suffix in (".json", ".txt"):
        from lmx.data.tokenizer_json import HuggingFaceTokenizer

        content = tokenizer_files.as_json(path, settings)
        return HuggingFaceTokenizer(content, end_token or tokenizer_files.guessed_end(content, path), settings)
    if path.suffix == ".spm":
        from lmx.data.tokenizer_marian import MarianTokenizer

        return MarianTokenizer.of(path.parent, end_token)
    settings = tokenizer_files.with_defaults(path.name, settings)
    return tokenizer_extras.SentencePieceTokenizer(path.read_bytes(), end_token, settings)
