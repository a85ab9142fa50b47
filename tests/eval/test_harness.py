"""Tasks of lm-eval on a model of lmx: the contract without the package, and with it a task over a local file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluated import log_softmax

from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.eval.harness import Adapter, run_harness

QUESTIONS = [
    {"q": f"the {thing} is", "choices": ["old", "a lazy dog"], "answer": i % 2} for i, thing in enumerate("abcdef")
]
TASK = """
task: birds
dataset_path: json
dataset_kwargs:
  data_files:
    validation: FILE
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@dataclass
class Request:
    args: tuple[Any, ...]


def asked(*args: tuple[Any, ...]) -> list[Request]:
    return [Request(own) for own in args]


@pytest.fixture(scope="module")
def adapter(decoder: Model) -> Adapter:
    return Adapter(decoder, batch=4)


def plain(model: Model, context: str, continuation: str) -> tuple[float, bool]:
    whole, start = model.tokenizer.encode(context + continuation), len(model.tokenizer.encode(context))
    scores = log_softmax(model.logits(np.array([[model.tokenizer.end_id, *whole[:-1]]]))[0])
    places, targets = np.arange(start, len(whole)), np.array(whole[start:])
    return float(scores[places, targets].sum()), bool((scores[places].argmax(1) == targets).all())


def test_loglikelihood(adapter: Adapter, decoder: Model) -> None:
    pairs = [("the quick brown", " fox"), ("", "three dogs")]
    for found, pair in zip(adapter.loglikelihood(asked(*pairs)), pairs, strict=True):
        expected = plain(decoder, *pair)
        assert found[0] == pytest.approx(expected[0], abs=1e-3)
        assert found[1] == expected[1]


def test_loglikelihood_of_a_text_beyond_the_context_goes_in_whole_windows(adapter: Adapter, decoder: Model) -> None:
    short, long = "the old garden", " ".join(["dogs sing"] * 60)
    found = adapter.loglikelihood_rolling(asked((short,), (long,)))
    assert found[0] == pytest.approx(plain(decoder, "", short)[0], abs=1e-3)
    stream, room = [decoder.tokenizer.end_id, *decoder.tokenizer.encode(long)], decoder.spec.context
    assert room < len(stream) - 1 < 3 * room
    total, done = 0.0, 0
    while done < len(stream) - 1:  # the last window is whole too, and its first tokens are not scored again
        end = min(done + room, len(stream) - 1)
        scores = log_softmax(decoder.logits(np.array([stream[end - room : end]]))[0])
        places = np.arange(done, end)
        total += scores[places - end + room, np.array(stream)[places + 1]].sum()
        done = end
    assert found[1] == pytest.approx(total, abs=1e-2)


def test_generate_until(adapter: Adapter, decoder: Model) -> None:
    prompts = ["the quick brown", "small birds"]
    whole = [c.text for c in decoder.generate(prompts, max_new_tokens=6, temperature=0)]
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}
    assert adapter.generate_until(asked(*((p, options) for p in prompts))) == whole
    stop = whole[0][2:4]
    (cut,) = adapter.generate_until(asked((prompts[0], {**options, "until": [stop]})))
    assert cut == whole[0][: whole[0].index(stop)]
    with pytest.raises(UserError, match="asks for num_beams, which lmx does not do"):
        adapter.generate_until(asked(("the", {"num_beams": 3})))


def test_without_the_package_one_sentence_says_what_to_install(decoder: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"not installed; run: pip install 'lmx\[harness\]'"):
        run_harness(decoder, ["arc_easy"])


def test_a_task_over_a_local_file(decoder: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "birds.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    found = run_harness(decoder, [str(tmp_path / "birds.yaml")], limit=4)["birds"]
    hits = [
        np.argmax([plain(decoder, row["q"], f" {c}")[0] for c in row["choices"]]) == row["answer"]
        for row in QUESTIONS[:4]
    ]
    assert found.n == 4
    assert found.measures["acc"].value == np.mean(hits)
    assert found.measures["acc"].stderr == pytest.approx(np.std(hits, ddof=1) / 2)
    with pytest.raises(UserError, match="lm-eval has no task 'bird'; nearest are birds"):
        run_harness(decoder, [str(tmp_path / "birds.yaml"), "bird"])
