"""What lies beside a tokenizer: its settings; and the files of older tokenizers, brought into one form."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lmx.data import cache
from lmx.data.tokenizer import KNOWN_ENDS, SETTINGS
from lmx.errors import UserError

SPECIALS_MAP = "special_tokens_map.json"
DEFAULTS: dict[str, dict[str, Any]] = {
    "spiece.model": {"add_eos_token": True, "extra_ids": 100},
    "tokenizer.model": {"add_bos_token": True},
    "sentencepiece.bpe.model": {"add_bos_token": True, "add_eos_token": True},
}
"""What transformers puts around texts, and the tokens that it adds, for SentencePiece files of these names (T5's,
Llama's and Gemma's, XLM-RoBERTa's)."""


def read_settings(directory: Path) -> dict[str, Any]:
    """The entries of ``tokenizer_config.json`` and ``special_tokens_map.json``; tokens as their text.

    Raises:
      UserError: a file that is not a JSON object.
    """
    settings: dict[str, Any] = {}
    for name in (SPECIALS_MAP, SETTINGS):
        if (directory / name).is_file():
            settings |= {k: _text(v) for k, v in _read(directory / name).items() if v is not None}
    return settings


def with_defaults(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with what goes without saying for a file of this name."""
    return {**DEFAULTS.get(name, {}), **settings}


def as_json(path: Path, settings: Mapping[str, Any]) -> str:
    """The content of a ``tokenizer.json``, or what it would be for a ``vocab.txt`` or ``vocab.json``."""
    if path.name == "vocab.txt":
        return _word_piece(path, settings).to_str()
    if path.name == "vocab.json":
        return _byte_pairs(path, settings).to_str()
    return path.read_text(encoding="utf-8")


def guessed_end(content: str, path: Path) -> str:
    """The token that ends a document, by its usual names. Raises UserError if there is none."""
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


def _read(path: Path) -> dict[str, Any]:
    try:
        content = cache.read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, expected an object; download it again")
    return content


def _text(value: Any) -> Any:
    """A token's text, of an entry that also says how it is matched; other entries as they are."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _word_piece(path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """BERT's ``vocab.txt``: one token a line."""
    names = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    names = {key: settings.get(key, name) for key, name in {**names, "mask_token": "[MASK]"}.items()}
    vocab = {line.rstrip("\n"): i for i, line in enumerate(path.open(encoding="utf-8"))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=names["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _add_specials(tokenizer, names, settings)
    first, last = (names[key] for key in ("cls_token", "sep_token"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[first, "$A", last],
        pair=[first, "$A", last, "$B:1", f"{last}:1"],
        special_tokens=[(token, vocab[token]) for token in (first, last)],
    )
    return tokenizer


def _byte_pairs(path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """GPT-2's ``vocab.json`` and ``merges.txt``, with ``<s>`` and ``</s>`` around texts if it has them (RoBERTa)."""
    merges = path.with_name("merges.txt")
    if not merges.is_file():
        raise UserError(f"{path} needs a merges.txt beside it; download that, or a tokenizer.json")
    vocab: dict[str, int] = cache.read_json(path)
    space = settings.get("add_prefix_space", False)
    tokenizer = Tokenizer(models.BPE.from_file(str(path), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    named = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>")
    _add_specials(tokenizer, {name: name for name in named if name in vocab}, settings)
    first, last = (settings.get(key, name) for key, name in (("cls_token", "<s>"), ("sep_token", "</s>")))
    if first in vocab and last in vocab:
        tokenizer.post_processor = processors.RobertaProcessing(
            (last, vocab[last]), (first, vocab[first]), trim_offsets=True, add_prefix_space=space
        )
    return tokenizer


def _add_specials(tokenizer: Tokenizer, names: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    given = {v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str)}
    known = [t for t in dict.fromkeys([*names.values(), *sorted(given)]) if tokenizer.token_to_id(t) is not None]
    # A mask stands for a word with the space before it, as transformers has it.
    tokenizer.add_special_tokens([AddedToken(t, special=True, lstrip=t == "<mask>") for t in known])
