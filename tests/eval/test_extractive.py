"""Answers that are stretches of a context, by a head that finds them, and in words."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluated import SIZES, made
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lmx.data.tokenizer import Encoded
from lmx.data.tokenizer_json import HuggingFaceTokenizer
from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.eval.run import run_tasks
from lmx.eval.tasks import ExtractiveQa, extractive
from lmx.eval.tasks.stretches import best_span
from lmx.eval.tasks.task import Examinee
from lmx.models.families.bert import Bert


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_extractive_answers_in_words_and_squads_own_file(decoder: Model, tmp_path: Path) -> None:
    question = {"question": "who sings", "id": "1", "answers": [{"text": "birds", "answer_start": 0}] * 2}
    content = {"data": [{"paragraphs": [{"context": "birds sing", "qas": [question]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(content))
    task = ExtractiveQa(files=(str(tmp_path / "squad.json"),), max_answer_tokens=3)
    (row,) = task.examples()
    assert (row["context"], row["answers"]) == ("birds sing", ["birds", "birds"])
    found = run_tasks(decoder, {"t": task})["t"]
    assert set(found.measures) == {"exact_match", "f1"}
    assert found.notes["by"] == "generation"


@pytest.fixture(scope="module")
def finder() -> Model:
    """A model whose head finds stretches."""
    return made(Bert(**SIZES, layers=1, task="question_answering"), before=False)


def test_extractive_answers_by_the_head_that_finds_spans(finder: Model, tmp_path: Path) -> None:
    model = finder
    rows = [{"question": "who sings", "context": f"the {n} birds sing in the old garden", "answers": []} for n in "ab"]
    end, expected, none = model.tokenizer.end_id, [], []
    for row in rows:
        first, second = (model.tokenizer.encode(row[name]) for name in ("question", "context"))
        tokens = [*first, end, *second, end]
        types = [0] * (len(first) + 1) + [1] * (len(second) + 1)
        assert model.tokenize([(row["question"], row["context"])])[0] == (tokens, types)
        scores = np.asarray(model.scores([(row["question"], row["context"])]))[0]
        places = range(len(first) + 1, len(tokens) - 1)
        spans = [(scores[a, 0] + scores[b, 1], a, b) for a in places for b in places if a <= b < a + 4]
        best, start, last = max(spans)
        none.append(scores[0].sum() - best)
        expected.append(model.tokenizer.decode(tokens[start : last + 1]).strip())
    right = [{**row, "answers": [text]} for row, text in zip(rows, expected, strict=True)]
    task = ExtractiveQa(files=(written(tmp_path / "qa.jsonl", right),), max_answer_tokens=4)
    for threshold in (1e9, max(none) + 1e-3, np.mean(none), min(none) - 1e-3):
        found = run_tasks(model, {"t": replace(task, null_threshold=threshold)})["t"]
        assert found.measures["exact_match"].value == np.mean([own <= threshold for own in none])
    assert found.notes["by"] == "the span head"


def wordpiece() -> HuggingFaceTokenizer:
    """In BERT's way, whose decoder does not give a text back as it was."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "the", "u", ".", "s", "cost", "$", "5", ",", "000", "in", "what"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(special)
    return HuggingFaceTokenizer(tokenizer.to_str(), "[SEP]")


PRICE = {"question": "what cost", "context": "the u " * 70 + "cost $5,000 in the U.S. " + "in " * 60}


@pytest.mark.parametrize(
    ("row", "changes", "counts", "right"),
    [
        ({"answers": ["$5,000"]}, {}, (1, 0, 0), True),
        ({"answers": [""]}, {}, (1, 0, 0), False),
        ({"answers": ["$5,000"]}, {"null_threshold": -20.0}, (1, 0, 0), False),
        ({"answers": [], "context": "the U.S. " * 70}, {}, (1, 0, 0), True),
        ({"answers": ["$5,000"], "question": "what " * 40}, {}, (1, 1, 0), True),
        ({"answers": ["$5,000"], "question": "what " * 40}, {"too_long": "drop"}, (0, 0, 1), None),
    ],
)
def test_answers_are_stretches_of_the_context_in_its_windows(
    finder: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    row: dict[str, Any],
    changes: dict[str, Any],
    counts: tuple[int, int, int],
    right: bool | None,
) -> None:
    tokenizer, read = wordpiece(), []

    def scores(examinee: Examinee, texts: list[Encoded]) -> np.ndarray:
        """A head that finds the price, and holds that there is none in all other windows."""
        read.extend(text.ids for text in texts)
        first, last = (tokenizer.token_id(token) for token in ("$", "000"))
        found = np.zeros((len(texts), 96, 2), np.float32)
        for own, text in zip(found, texts, strict=True):
            ids = np.array(text.ids)
            own[: len(ids)] = 9 * np.stack([ids == first, ids == last], -1)
            own[0] = 4 if first in ids else 20
        return found

    monkeypatch.setattr(extractive, "head_scores", scores)
    rows = written(tmp_path / "qa.jsonl", [{**PRICE, **row}])
    task = replace(ExtractiveQa(files=(rows,), overlap=60), **changes)
    outcome = lambda: run_tasks(replace(finder, tokenizer=tokenizer), {"t": task})["t"]  # noqa: E731
    if right is None:
        with pytest.raises(UserError, match="nothing to measure"):
            outcome()
        return
    found = outcome()
    assert (found.n, found.truncated, found.dropped) == counts
    assert found.measures["exact_match"].value == right
    assert len(read) > 1
    for before, after in pairwise(read):  # each window has 60 tokens of the one before, and fills its row
        assert len(before) == 96
        start = after.index(3) + 1
        assert before[-61:-1] == after[start : start + 60]


def test_windows_that_share_all_they_have_are_refused(finder: Model, tmp_path: Path) -> None:
    task = ExtractiveQa(files=(written(tmp_path / "qa.jsonl", [{**PRICE, "answers": []}]),), overlap=93)
    with pytest.raises(UserError, match="the task's overlap is 93, expected 0 to below 93: a window of 96 tokens"):
        run_tasks(finder, {"t": task})


def test_the_best_span() -> None:
    scores = np.zeros((6, 2))
    scores[1, 0], scores[4, 1], scores[2, 1], scores[0, 1] = 3, 2, 1, 9  # no stretch ends before it begins
    scores[0, 0] = -9
    assert best_span(scores, 9) == (5, 1, 5)
    assert best_span(scores, 3) == (4, 1, 3)
    assert best_span(scores[:0], 3) == (-np.inf, 0, 0)
