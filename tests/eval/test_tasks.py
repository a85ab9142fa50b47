"""Tasks over local files, end to end on tiny models."""

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from evaluated import log_softmax

from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.eval.metrics.classification import calibration_error
from lmx.eval.run import Changes, run_tasks, table
from lmx.eval.tables import listed, read_rows
from lmx.eval.tasks import Classification, CrowsPairs, Generation, MultipleChoice, StereoSet
from lmx.eval.tasks.task import Examinee

ROWS = [
    {"question": f"what is {i} of the {thing}", "answer": i % 2, "options": [f"old {thing}", "a lazy dog and a fox"]}
    for i, thing in enumerate(["garden", "bird", "fox", "dog", "song"])
]
CHOICE = MultipleChoice(prompt="{question}?", choices="options", answer="answer")


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(written(tmp_path / "rows.jsonl", ROWS))


def plain_score(model: Model, context: str, continuation: str) -> tuple[float, int]:
    """The sum of log-probabilities after the context, and how many tokens that are: from one forward pass."""
    whole, start = model.tokenizer.encode(context + continuation), len(model.tokenizer.encode(context))
    scores = log_softmax(model.logits(np.array([[model.tokenizer.end_id, *whole[:-1]]]))[0])
    return float(scores[np.arange(start, len(whole)), whole[start:]].sum()), len(whole) - start


def test_multiple_choice_takes_the_likeliest_in_each_way(decoder: Model, file: str) -> None:
    task = replace(CHOICE, files=(file,), limit=2)
    hits: dict[str, list[bool]] = {name: [] for name in ("", "_per_byte", "_per_token", "_unconditional")}
    for row in ROWS[:2]:
        choices = row["options"]
        own = [plain_score(decoder, f"{row['question']}?", f" {c}") for c in choices]
        alone = [plain_score(decoder, "Answer:", f" {c}")[0] for c in choices]
        raw = np.array([score for score, _ in own])
        ways = (raw, raw / [len(c) for c in choices], raw / [n for _, n in own], raw - alone)
        for name, values in zip(hits, ways, strict=True):
            hits[name].append(int(values.argmax()) == row["answer"])
    for batch in (1, 8):
        found = run_tasks(decoder, {"t": task}, batch=batch)["t"]
        assert {n.removeprefix("accuracy"): m.value for n, m in found.measures.items()} == {
            name: np.mean(own) for name, own in hits.items()
        }
    assert "accuracy_per_byte" in table({"t": found})


def test_shots_are_others_the_same_for_a_seed_and_shown_with_their_answers(decoder: Model, file: str) -> None:
    task = Changes((file,), None, 2, 7).applied(replace(CHOICE, description="Answer these."))
    contexts = task.contexts(ROWS)
    assert contexts == task.contexts(ROWS)
    assert contexts != replace(task, seed=8).contexts(ROWS)
    for row, context in zip(ROWS, contexts, strict=True):
        parts = context.split("\n\n")
        assert parts[0] == "Answer these."
        assert parts[3] == f"{row['question']}?"
        shown = {f"{o['question']}? {o['options'][o['answer']]}" for o in ROWS if o is not row}
        assert len(set(parts[1:3]) & shown) == 2
    with pytest.raises(UserError, match="5 shots need as many other examples, but there are 4"):
        replace(task, shots=5).contexts(ROWS)


def test_classification_by_words(decoder: Model, file: str) -> None:
    task = Classification(
        files=(file,), limit=2, prompt="{question}", label="answer", classes=("even", "odd"), words=("dog", "fox")
    )
    found = run_tasks(decoder, {"t": task})["t"]
    scores = [[plain_score(decoder, row["question"], f" {word}")[0] for word in task.words] for row in ROWS[:2]]
    probabilities = np.exp(log_softmax(scores))
    right = probabilities.argmax(1) == [0, 1]
    assert found.measures["accuracy"].value == right.mean()
    error = calibration_error(right, probabilities.max(1))
    assert found.measures["calibration_error"].value == pytest.approx(error, abs=1e-4)
    assert found.notes["by"] == "words"


def test_classification_by_a_task_head_is_that_of_scores(classifier: Model, file: str) -> None:
    task = Classification(files=(file,), prompt="{question}", label="answer", classes=("even", "odd"))
    found = run_tasks(classifier, {"t": task}, batch=2)["t"]
    expected = np.asarray(classifier.scores([row["question"] for row in ROWS])).argmax(1)
    assert found.measures["accuracy"].value == np.mean(expected == [row["answer"] for row in ROWS])
    with pytest.raises(UserError, match=r"t: the model's head gives \(2,\) scores, but there are 3 classes"):
        run_tasks(classifier, {"t": replace(task, classes=("a", "b", "c"))})
    named = replace(classifier, classes=("odd", "even"))  # its outputs' names, in their order
    for classes in (("even", "odd"), ("odd", "even"), ()):
        own = replace(task, classes=classes, label=lambda row: ("odd", "even")[row["answer"]])
        assert run_tasks(named, {"t": own}, batch=2)["t"].measures["accuracy"] == found.measures["accuracy"]
    long = {"prompt": lambda row: "dog " * 150, "too_long": "drop"}
    with pytest.raises(UserError, match="has nothing to measure"):
        run_tasks(classifier, {"t": replace(task, **long)})
    with pytest.raises(UserError, match="t: the task's classes are even, old, but the model's are odd, even; give"):
        run_tasks(named, {"t": replace(task, classes=("even", "old"))})
    with pytest.raises(UserError, match="shots and description need words"):
        run_tasks(classifier, {"t": replace(task, shots=1)})


def test_generation_is_that_of_generate(decoder: Model, file: str) -> None:
    task = Generation(files=(file,), prompt="{question}", references=lambda row: row["options"], max_new_tokens=4)
    expected = decoder.generate([row["question"] for row in ROWS], max_new_tokens=4, temperature=0)
    rows = [{**row, "options": [c.text]} for row, c in zip(ROWS, expected, strict=True)]
    rows[0]["options"] = ["something else"]
    path = written(Path(file).with_name("right.jsonl"), rows)
    found = run_tasks(decoder, {"t": replace(task, files=(str(path),), stop=())}, batch=2)["t"]
    assert found.measures["exact_match"].value == 0.8


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"a": "one, two", "b": 'say "x"'}, {"a": "line\nbreak", "b": "ü"}]
    written(tmp_path / "t.jsonl", rows)
    (tmp_path / "t.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "u.jsonl.gz").write_bytes(gzip.compress((tmp_path / "t.jsonl").read_bytes()))
    with (tmp_path / "t.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["a", "b"], *([row["a"], row["b"]] for row in rows)])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.json", "u.jsonl.gz", "t.csv", "t.parquet"):
        assert read_rows((str(tmp_path / name),), listed) == rows, name


TOO_LONG = [*ROWS[:1], {**ROWS[1], "question": "dog " * 150}]


@pytest.mark.parametrize(("policy", "counts"), [("truncate", (2, 1, 0)), ("drop", (1, 0, 1))])
def test_what_is_too_long_is_counted(
    decoder: Model, classifier: Model, tmp_path: Path, policy: Any, counts: tuple[int, ...]
) -> None:
    path = str(written(tmp_path / "long.jsonl", TOO_LONG))
    by_head = Classification(prompt="{question}", label="answer", classes=("even", "odd"))
    for model, task in ((decoder, CHOICE), (classifier, by_head)):
        found = run_tasks(model, {"t": replace(task, files=(path,), too_long=policy)})["t"]
        assert (found.n, found.truncated, found.dropped) == counts
        told = f"too long for the context: {counts[1]} truncated, {counts[2]} dropped"
        assert told in table({"t": found})


LONG = "dog " * 150
SENTENCES = {"sent_more": LONG, "sent_less": LONG, "stereo_antistereo": "stereo", "bias_type": "age"}
CONTINUED = {"context": "the", "target": "fox", "type": "intersentence", "bias_type": "age"}
CONTINUED |= {"stereotype": LONG, "anti-stereotype": "fox", "unrelated": "song"}
ALONE_TOO_LONG = {
    "choice": (CHOICE, {**ROWS[0], "options": [LONG, "fox"]}, ROWS[1]),
    "crows": (CrowsPairs(), SENTENCES, {**SENTENCES, "sent_more": "the dog", "sent_less": "the fox"}),
    "stereoset": (StereoSet(), CONTINUED, {**CONTINUED, "stereotype": "dog"}),
}


@pytest.mark.parametrize("case", ALONE_TOO_LONG)
def test_an_answer_that_alone_is_too_long_is_dropped_or_refused(decoder: Model, tmp_path: Path, case: str) -> None:
    task, *rows = ALONE_TOO_LONG[case]
    task = replace(task, files=(str(written(tmp_path / "rows.jsonl", rows)),))
    found = run_tasks(decoder, {"t": replace(task, too_long="drop")})["t"]
    assert (found.n, found.truncated, found.dropped) == (1, 0, 1)
    for policy in ("truncate", "refuse"):
        with pytest.raises(UserError, match=r'^t: example 0: a continuation has .*, or let too_long be "drop"$'):
            run_tasks(decoder, {"t": replace(task, too_long=policy)})


MISTAKES = {
    "refused": ({"too_long": "refuse"}, TOO_LONG, "example 1 is .* tokens longer than the model's context"),
    "column": ({"prompt": "{text}"}, ROWS, "no column 'text'; the columns are question, answer, options"),
    "answer": ({"answer": "question"}, ROWS, "is none of the choices"),
    "choices": ({"choices": "question"}, ROWS, "expected at least two texts"),
    "function": ({"choices": lambda row: row["nothing"]}, ROWS, "no column 'nothing'"),
    "raises": ({"choices": lambda row: 1 / 0}, ROWS, "raised ZeroDivisionError"),
    "empty choice": ({"choices": ("", "fox"), "delimiter": ""}, ROWS, "'' has no tokens of its own"),
    "template": ({"prompt": "{question"}, ROWS, "is not one: "),
    "no examples": ({}, [], "there is no example in it"),
    "nothing left": ({"too_long": "drop"}, TOO_LONG[1:], "accuracy has nothing to measure"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(decoder: Model, tmp_path: Path, case: str) -> None:
    changes, rows, said = MISTAKES[case]
    path = str(written(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match=f"^my task: .*{said}"):
        run_tasks(decoder, {"my task": replace(CHOICE, files=(path,), **changes)})


def test_references_of_another_number_of_lines_are_refused(decoder: Model, tmp_path: Path) -> None:
    for name, lines in (("source.txt", "one\ntwo\n"), ("target.txt", "eins\nzwei\ndrei\n")):
        (tmp_path / name).write_text(lines)
    files = {"files": (str(tmp_path / "source.txt"),), "reference_files": (str(tmp_path / "target.txt"),)}
    task = Generation(prompt="{text}", **files)
    for limit in (0, 1):
        with pytest.raises(UserError, match=r"target\.txt has 3 lines, but there are 2 examples"):
            replace(task, limit=limit).run(Examinee(decoder))
    broken = "one\u2028half\r\n\ntwo\x0cpage\n"  # three lines, by newlines alone
    (tmp_path / "source.txt").write_text(broken, newline="")
    rows = [(row["text"], row["reference"]) for row in task.examples()]
    assert rows == [("one\u2028half", "eins"), ("", "zwei"), ("two\x0cpage", "drei")]
    assert len(replace(task, limit=2).examples()) == 2


def test_settings_without_effect_are_refused(file: str) -> None:
    with pytest.raises(UserError, match="a CrowsPairs task has no prompts, so it takes no shots"):
        Changes(shots=1).applied(CrowsPairs())
    with pytest.raises(UserError, match="has no files"):
        CHOICE.examples()
