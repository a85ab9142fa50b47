"""How a model is meant to be decoded: what its ``generation_config.json`` and ``config.json`` say."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmx.checkpoint.huggingface.tensors import read_json
from lmx.decode.sampling import Sampling
from lmx.errors import UserError

FILE = "generation_config.json"
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"), 1),
    "length_penalty": 1.0,
    "typical_p": 1.0,
    "encoder_repetition_penalty": 1.0,
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "epsilon_cutoff", "eta_cutoff", "diversity_penalty"), 0),
}
"""Entries that change nothing with these values."""
HARMLESS = (
    *("transformers_version", "_from_model_config", "use_cache", "max_length", "max_new_tokens", "early_stopping"),
    *("cache_implementation", "return_dict_in_generate", "output_attentions", "output_hidden_states"),
)
"""Entries that choose no token: how much is written is the caller's to say, and ends early with beams only."""


@dataclass(frozen=True)
class Defaults:
    """What decoding does unless it is told otherwise.

    Attributes:
      sampling: how tokens are drawn.
      stops: tokens that end a text; the tokenizer's end of text if there are none.
      tokens: other tokens with a role, by it: ``bos``, ``pad``, ``decoder_start``.
      unknown: entries of the file that ask for what is not done, with their values.
      source: where the sampling comes from, for people.
    """

    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[int, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)
    source: str = "lmx's own defaults"

    def with_options(self, **given: Any) -> Sampling:
        """The sampling with what a caller gives; None leaves the default."""
        values = {name: getattr(self.sampling, name) for name in SAMPLED}
        return Sampling(**values | {name: value for name, value in given.items() if value is not None})

    def warn_unknown(self) -> None:
        """Warns of what is asked for and not done."""
        if self.unknown:
            asked = ", ".join(f"{name} {value!r}" for name, value in self.unknown.items())
            warnings.warn(f"{FILE} asks for {asked}, which lmx does not do when it generates", stacklevel=3)


def read_defaults(directory: Path, config_json: Mapping[str, Any]) -> Defaults:
    """The defaults of a Hugging Face directory.

    Args:
      directory: where ``generation_config.json`` is, if there is one.
      config_json: the content of ``config.json``, which gives tokens that the other file does not.

    Raises:
      UserError: a number that cannot be.
    """
    file = directory / FILE
    content: dict[str, Any] = read_json(file) if file.is_file() else {}
    both: dict[str, Any] = {**{k: v for k, v in config_json.items() if k.endswith("_token_id")}, **content}
    ends = both.get("eos_token_id")
    ends = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    tokens = {name: both.get(f"{name}_token_id") for name in ("bos", "pad", "decoder_start")}
    return Defaults(
        sampling=_sampling(file, content) if content else Sampling(),
        stops=ends,
        tokens={name: int(token) for name, token in tokens.items() if token is not None},
        unknown=_unknown({**content, **{k: v for k, v in both.items() if k.startswith("forced_")}}),
        source=FILE if content else Defaults.source,
    )


def _sampling(file: Path, content: Mapping[str, Any]) -> Sampling:
    """Greedy unless ``do_sample``; a number that the file does not give filters nothing."""
    given = {name: content[name] for name in SAMPLED if content.get(name) is not None}
    if not content.get("do_sample", False):
        given = {"temperature": 0.0, "repetition_penalty": given.get("repetition_penalty", 1.0)}
    try:
        return Sampling(**given)
    except (UserError, TypeError) as error:
        raise UserError(f"{file} cannot be followed: {error}") from error


def _unknown(content: Mapping[str, Any]) -> dict[str, Any]:
    read = (*SAMPLED, *HARMLESS, "do_sample", *(f"{n}_token_id" for n in ("eos", "bos", "pad", "decoder_start")))
    asked = {k: v for k, v in content.items() if k not in read and v is not None and v is not False}
    return {k: v for k, v in asked.items() if v not in ([], {}, NEUTRAL.get(k))}
