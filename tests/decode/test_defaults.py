"""What generation_config.json and config.json say of decoding."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmx.decode.defaults import read_defaults
from lmx.decode.sampling import Sampling
from lmx.errors import UserError

LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 5], "bos_token_id": 0}


def write(directory: Path, content: Any) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(content))
    return directory


def test_sampling_and_tokens(tmp_path: Path) -> None:
    found = read_defaults(write(tmp_path, LLAMA), {"eos_token_id": 7, "pad_token_id": 3, "hidden_size": 8})
    assert found.sampling == Sampling(temperature=0.6, top_p=0.9)
    assert found.stops == (1, 5)
    assert found.tokens == {"bos": 0, "pad": 3}
    assert not found.unknown
    assert found.with_options(temperature=None, top_k=4) == Sampling(temperature=0.6, top_p=0.9, top_k=4)


@pytest.mark.parametrize(
    ("content", "temperature"), [({}, 1.0), ({"temperature": 0.3}, 0.0), ({"do_sample": False, "top_p": 0.5}, 0.0)]
)
def test_greedy_unless_it_says_so(tmp_path: Path, content: dict[str, Any], temperature: float) -> None:
    found = read_defaults(write(tmp_path, content), {"eos_token_id": 2, "decoder_start_token_id": 0})
    assert found.sampling == Sampling(temperature=temperature)
    assert found.with_options(temperature=0.5) == Sampling(temperature=0.5)
    assert (found.stops, found.tokens) == ((2,), {"decoder_start": 0})


def test_no_file_is_no_default(tmp_path: Path) -> None:
    found = read_defaults(tmp_path, {})
    assert (found.sampling, found.stops, found.source) == (Sampling(), (), "lmx's own defaults")


def test_what_is_not_done_is_named(tmp_path: Path) -> None:
    content = {"num_beams": 4, "length_penalty": 2.0, "no_repeat_ngram_size": 0, "max_length": 9, "use_cache": True}
    found = read_defaults(write(tmp_path, content), {"forced_bos_token_id": 0})
    assert found.unknown == {"num_beams": 4, "length_penalty": 2.0, "forced_bos_token_id": 0}
    with pytest.warns(UserWarning, match=r"num_beams 4, length_penalty 2.0, forced_bos_token_id 0"):
        found.warn_unknown()


@pytest.mark.parametrize(
    ("content", "words"),
    [([], "expected an object"), ({"do_sample": True, "top_p": 3}, "cannot be followed: top_p is 3")],
)
def test_bad_files_are_named(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_defaults(write(tmp_path, content), {})
