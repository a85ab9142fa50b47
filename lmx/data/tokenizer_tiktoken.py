"""Tokenizers of tiktoken files, which hold ranked pieces alone: the rest is published, or the recipe says it."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lmx.data import cache
from lmx.data.config import TokenizerFile
from lmx.data.tokenizer import (
    END_OF_TEXT,
    KNOWN_ENDS,
    SETTINGS,
    SPLIT,
    Encoded,
    Spanned,
    Text,
    TextTokenizer,
    known_token,
)
from lmx.data.tokenizer_extras import extra, single
from lmx.data.tokenizer_json import end_settings, roles
from lmx.errors import UserError

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_SPLIT = SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_O200K_UPPER, _O200K_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}*{_O200K_LOWER}+{_ENDINGS}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}+{_O200K_LOWER}*{_ENDINGS}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)
QWEN = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_CL100K = {END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
TABLE = "tiktoken"
"""The entry of ``tokenizer_config.json`` under which a saved tokenizer has its scheme."""


@dataclass(frozen=True)
class Scheme:
    """What a tiktoken file does not say: how text is split, the special tokens with their ids, and what goes without
    saying in its settings."""

    pattern: str
    special_tokens: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)


PUBLISHED: dict[int, tuple[str, Scheme]] = {
    50256: ("r50k_base (GPT-2)", Scheme(GPT2_SPLIT, {END_OF_TEXT: 50256})),
    50280: ("p50k_base", Scheme(GPT2_SPLIT, {END_OF_TEXT: 50256})),
    100256: ("cl100k_base", Scheme(SPLIT, {**_CL100K, "<|endofprompt|>": 100276})),
    199998: ("o200k_base", Scheme(O200K_SPLIT, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018})),
    128000: (
        "Llama 3",
        Scheme(
            SPLIT,
            {token: 128000 + i for i, token in enumerate(LLAMA3)},
            {"bos_token": "<|begin_of_text|>", "add_bos_token": True},
        ),
    ),
    151643: ("Qwen", Scheme(QWEN_SPLIT, {token: 151643 + i for i, token in enumerate(QWEN)})),
}
"""The published files, told apart by how many ranks they have. Sources: tiktoken_ext/openai_public.py; Meta's
llama3/tokenizer.py; tokenization_qwen.py of Qwen-7B."""


def scheme_of(ranks: int, config: TokenizerFile, settings: Mapping[str, Any]) -> Scheme:
    """The scheme of a file with so many ranks: what the recipe says, else what lies beside it, else what is published.

    Raises:
      UserError: none of them says it.
    """
    saved, (_, known) = settings.get(TABLE), PUBLISHED.get(ranks, ("", Scheme("", {})))
    saved = saved if isinstance(saved, dict) else {}
    added = settings.get("added_tokens_decoder", {})
    beside = {token["content"]: int(index) for index, token in added.items() if token.get("special", True)}
    pattern = config.pattern or saved.get("pattern") or known.pattern
    tokens = dict(config.special_tokens) or saved.get("special_tokens") or beside or known.special_tokens
    if not pattern or not tokens:
        names = ", ".join(f"{name} ({count:,})" for count, (name, _) in PUBLISHED.items())
        missing = " and ".join(n for n, v in (("pattern", pattern), ("special_tokens", tokens)) if not v)
        raise UserError(
            f"{config.path} has {ranks:,} ranks, which is none of the published tiktoken files, {names}, and the file "
            f"does not say how text is split or which special tokens there are: set {missing} of TokenizerFile"
        )
    return Scheme(pattern, tokens, {} if config.special_tokens else known.settings)


class TiktokenTokenizer(TextTokenizer):
    """A tiktoken file (lines of base64 and rank).

    Args:
      data: the file's content.
      config: where it comes from, and what the recipe says of it.
      end_token: ends a document; None takes the first of the usual ones that it has.
      settings: those of ``tokenizer_config.json``: ``add_bos_token`` puts ``bos_token`` (by default the end token)
        before prompts, and ``add_eos_token`` the end token after them.

    Raises:
      UserError: it is no published file, and nothing says its scheme; or there is no such end token.
    """

    def __init__(
        self, data: bytes, config: TokenizerFile, end_token: str | None, settings: Mapping[str, Any] | None = None
    ) -> None:
        ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in data.splitlines() if line)}
        self._scheme = scheme = scheme_of(len(ranks), config, settings or {})
        self._data, self._config, self._settings = data, config, {**scheme.settings, **(settings or {})}
        self._texts, specials = frozenset(ranks.values()), dict(scheme.special_tokens)
        self._encoding = extra("tiktoken").Encoding(
            config.path, pat_str=scheme.pattern, mergeable_ranks=ranks, special_tokens=specials
        )
        self._end_token = end_token or next((token for token in KNOWN_ENDS if token in specials), END_OF_TEXT)
        self.end_id = known_token(specials.get(self._end_token), self._end_token, list(specials)[:10])
        self.vocab_size = max(*self._texts, *specials.values()) + 1
        self.fingerprint = cache.digest("tiktoken", data.hex(), scheme.pattern, specials, self.end_id)
        self.special_tokens = {**roles(self._settings), "eos_token": self._end_token}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        return self._encoding.encode_ordinary_batch(list(texts))

    def encode_spans(self, texts: Sequence[str], *, special: bool = False) -> list[Spanned]:
        """See :class:`TextTokenizer`."""
        found = []
        for text in texts:
            ids = self._encoding.encode(text, allowed_special="all") if special else self.encode(text)
            starts = self._encoding.decode_with_offsets(ids)[1]
            ends = [max(start + 1, after) for start, after in pairwise([*starts, len(text)])]
            found.append(Spanned(ids, list(zip(starts, ends, strict=True))))
        return found

    def encode_prompts(self, texts: Sequence[Text], *, around: bool = True) -> list[Encoded]:
        """See :class:`TextTokenizer`."""
        start, end = (self._around(role) if around else [] for role in ("bos", "eos"))
        found = self._encoding.encode_batch([single(text) for text in texts], allowed_special="all")
        return [Encoded(ids, [0] * len(ids)) for ids in ([*start, *own, *end] for own in found)]

    def _around(self, role: str) -> list[int]:
        index = self.token_id(self.special_tokens.get(f"{role}_token", self._end_token))
        return [] if index is None or not self._settings.get(f"add_{role}_token") else [index]

    def token_id(self, token: str) -> int | None:
        """See :class:`TextTokenizer`."""
        try:
            return self._encoding.encode_single_token(token)
        except KeyError:
            return None

    def with_end_token(self, *, before: bool) -> "TiktokenTokenizer":
        """See :class:`TextTokenizer`."""
        settings = {**self._saved(), **end_settings(self._end_token, before)}
        return TiktokenTokenizer(self._data, self._config, self._end_token, settings)

    def decode(self, ids: Iterable[int]) -> str:
        """See :class:`TextTokenizer`."""
        return self._encoding.decode([int(i) for i in ids if i in self._texts])

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
        cache.write_json(Path(directory) / SETTINGS, self._saved())

    def _saved(self) -> dict[str, Any]:
        """The settings, with the scheme among them."""
        scheme = {"pattern": self._scheme.pattern, "special_tokens": dict(self._scheme.special_tokens)}
        return {**self._settings, "eos_token": self._end_token, TABLE: scheme}


def is_tiktoken(path: Path) -> bool:
    """Whether a file is named so, or has lines of base64 and rank (Llama 3 ships one named tokenizer.model)."""
    if path.suffix != ".model":
        return path.suffix == ".tiktoken"
    with path.open("rb") as file:
        first = file.readline().split()
    return len(first) == 2 and first[1].isdigit()
