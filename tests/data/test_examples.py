"""Labelled examples: from the columns of any file to tokens and labels, against plain references; mistakes named."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.data.builders.stdlib_modules import snippets
from lmx.data.builders.tables import _plain
from lmx.data.chat import CHATML
from lmx.data.config import (
    Answers,
    Chats,
    DataConfig,
    Examples,
    LabelledTexts,
    PreferredChats,
    RatedTexts,
    StdlibModules,
    TaggedWords,
    TextPairs,
    TrainedBpe,
)
from lmx.data.documents import prepare_documents
from lmx.data.layout import Whole
from lmx.data.packing import windows_of
from lmx.data.prepare import Prepared, prepare
from lmx.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"text": f"{word} number {i}, and more", "label": word} for i, word in enumerate(["one", "two", "three"] * 6)
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(source: Examples, cache: Path, **changes: Any) -> Prepared:
    config = {"sources": (source,), "tokenizer": TrainedBpe(300), "held_out": 0.2, "cache_dir": str(cache)}
    return prepare(DataConfig(**(config | changes)), workers=1, progress=False)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same rows in every form."""
    import pyarrow
    import pyarrow.parquet

    directory = tmp_path_factory.mktemp("forms")
    paths = {kind: str(directory / f"rows.{kind}") for kind in ("jsonl", "csv", "tsv", "json", "parquet")}
    write(Path(paths["jsonl"]), ROWS)
    Path(paths["json"]).write_text(json.dumps(ROWS))
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(paths[kind], "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), paths["parquet"], row_group_size=7)
    built = prepare_documents(LabelledTexts(files=(paths["jsonl"],)), directory / "cache", workers=1, progress=False)
    return paths | {"tfds": built.dataset.directory}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "json", "parquet"])
def test_every_form_gives_the_same_examples(kind: str, files: dict[str, str], tmp_path: Path) -> None:
    documents = prepare_documents(LabelledTexts(files=(files[kind],)), tmp_path, workers=1, progress=False)
    assert list(documents.texts(range(len(documents)))) == [row["text"] for row in ROWS]
    assert documents.classes == ("one", "three", "two")
    assert documents.kind == "classes"


def test_a_prepared_dataset_is_read_by_its_columns(files: dict[str, str], tmp_path: Path) -> None:
    source = LabelledTexts(files=(files["tfds"],), label_column="split")
    documents = prepare_documents(source, tmp_path, workers=1, progress=False)
    assert list(documents.texts(range(len(documents)))) == [row["text"] for row in ROWS]
    assert documents.classes == ("train",)
    with pytest.raises(UserError, match=r"has no split 'test' \(it has train\)"):
        prepare_documents(
            LabelledTexts(files=(files["tfds"],), split="test"), tmp_path / "b", workers=1, progress=False
        )


def test_classes_of_a_dataset_come_by_name() -> None:
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel(names=["bad", "good"])
    assert _plain(np.int64(1), label) == "good"
    assert _plain(np.array([b"a", b"b"], object), tfds.features.Sequence(tfds.features.Text())) == ["a", "b"]
    assert _plain(np.array([1, 0]), tfds.features.Sequence(label)) == ["good", "bad"]


def test_labels_are_stored_and_held_out_files_are_kept_apart(tmp_path: Path) -> None:
    train, test = write(tmp_path / "train.jsonl", ROWS[:12]), write(tmp_path / "test.jsonl", ROWS[12:])
    data = prepared(LabelledTexts(files=(train,), held_out_files=(test,), classes=("two", "one", "three")), tmp_path)
    source = data.sources[0]
    assert data.classes == ("two", "one", "three")
    assert source.chosen("held_out").tolist() == list(range(12, 18))
    assert source.labels is not None
    labels = [source.labels.values(i).tolist() for i in range(18)]
    assert labels == [[data.classes.index(row["label"])] for row in ROWS]
    assert data.tokenizer.decode(source.tokens.values(3)) == ROWS[3]["text"]
    assert data.stats()["classes"] == ["two", "one", "three"]
    other = prepared(LabelledTexts(files=(train,), held_out_files=(test,)), tmp_path)
    assert other.fingerprint != data.fingerprint


def slow_windows(length: int, first: int, second: int, longer: str, overlap: int) -> list[tuple[int, int]]:
    """(start, count) of the windows of one example with 3 tokens around it, one by one."""
    if first + second + 3 <= length:
        return [(0, first)]
    if longer != "split":
        return [] if longer == "drop" else [(0, first)]
    free, found, start = length - second - 3, [], 0
    if free <= overlap:
        return []
    while True:
        found.append((start, min(free, first - start)))
        if start + free >= first:
            return found
        start += free - overlap


@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 15)), min_size=1, max_size=12),
    longer=st.sampled_from(["drop", "truncate", "split"]),
    overlap=st.integers(0, 6),
)
def test_windows_are_those_of_a_plain_loop(sizes: list[tuple[int, int]], longer: str, overlap: int) -> None:
    first, second = (np.array(column) for column in zip(*sizes, strict=True))
    whole = Whole(lambda a, b: np.asarray(a) + b + 3, longer, overlap)
    pieces, taken, counts = windows_of(np.arange(len(sizes)), first, second, 20, whole)
    expected = [slow_windows(20, a, b, longer, overlap) for a, b in sizes]
    assert pieces.tolist() == [(i, start, count) for i, found in enumerate(expected) for start, count in found]
    assert (taken <= 20).all()
    assert counts.get("dropped", 0) == sum(not found for found in expected)
    if longer == "split":
        assert counts["cut"] == sum(len(found) > 1 for found in expected)


def test_snippets_are_whole_lines() -> None:
    text = "".join(f"line {i}\n" for i in range(30))
    found = list(snippets(text, 50))
    assert text.startswith("".join(part for _, part in found))
    assert all(len(part) <= 50 and part.startswith(f"line {first - 1}\n") for first, part in found)


def chat(role: str = "assistant", **flags: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "a", **flags}]}


BAD: list[tuple[Callable[[str], Examples], dict[str, Any], str]] = [
    (lambda f: LabelledTexts(files=(f,), classes=("one",)), ROWS[1], "'two', which is none of the source's 1 classes"),
    (lambda f: LabelledTexts(files=(f,)), {"text": "a", "label": None}, "column label is empty"),
    (lambda f: LabelledTexts(files=(f,)), {"text": " ", "label": "a"}, "column text is empty"),
    (lambda f: LabelledTexts(files=(f,)), {"text": 3, "label": "a"}, "column 'text' is 3, expected text"),
    (lambda f: LabelledTexts(files=(f,)), {"words": "a"}, "has no column 'label' .it has words."),
    (lambda f: LabelledTexts(files=(f,)), {"text": "a", "label": 0.5}, "expected names or whole numbers"),
    (lambda f: RatedTexts(files=(f,)), {"text": "a", "label": "x"}, "expected a number"),
    (lambda f: TextPairs(files=(f,)), {"source": "a", "target": ""}, "column target is empty"),
    (lambda f: TaggedWords(files=(f,)), {"tokens": ["a", "b"], "tags": ["A"]}, "has 2 words but 1 tags"),
    (
        lambda f: Answers(files=(f,)),
        {"context": "a b", "question": "q", "answers": {"text": ["b"], "answer_start": [1]}},
        "the answer 'b' is not at character 1",
    ),
    (lambda f: Answers(files=(f,)), {"context": "a b", "question": "q", "answers": "x"}, "expected JSON"),
    (lambda f: Chats(files=(f,)), {"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
    (lambda f: Chats(files=(f,)), {"messages": "[1]"}, "expected a list of"),
    (lambda f: Chats(files=(f,)), chat(weight=0.5), 'a message has {"weight": 0.5}, expected "train" true or false'),
    (lambda f: Chats(files=(f,)), chat(weight=1, train=False), "and both alike"),
    (lambda f: Chats(files=(f,)), chat("user", train=True), "of the role 'user' .* but only the assistant's are"),
    (lambda f: Chats(files=(f,)), chat(weight=0), "no message of the assistant to learn"),
    (
        lambda f: PreferredChats(files=(f,)),
        {"prompt": "a", "chosen": chat(weight=0)["messages"], "rejected": "c"},
        "a message has train or weight off, but preferences compare",
    ),
]


@pytest.mark.parametrize(("source", "row", "message"), BAD, ids=[message[:30] for *_, message in BAD])
def test_a_bad_example_is_named(source: Any, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match=message) as error:
        prepare_documents(source(file), tmp_path, workers=1, progress=False)
    assert "rows.jsonl@0" in str(error.value)


def test_examples_that_are_empty_may_be_dropped_and_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [*ROWS, {"text": "", "label": "one"}])
    data = prepared(LabelledTexts(files=(file,), empty="drop"), tmp_path)
    assert data.stats()["sources"]["labelled_texts"]["dropped"] == 1


def test_chats_without_a_template_and_failing_templates_are_refused(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 3
    file = write(tmp_path / "chats.jsonl", [{"messages": messages} for messages in chats])
    with pytest.raises(UserError, match="brings no chat template: set the template of Chats to 'chatml'"):
        prepared(Chats(files=(file,)), tmp_path)
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('no ' + messages[0].role) }}")
    with pytest.raises(UserError, match=r"chats.jsonl@0: the chat template does not take these messages: no user"):
        prepared(Chats(files=(file,), template=str(tmp_path / "bad.jinja")), tmp_path)
    data = prepared(Chats(files=(file,), template="chatml"), tmp_path)
    assert data.tokenizer.token_id("<|im_end|>") is not None
    data.save_tokenizer(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == CHATML


def test_squads_own_file_is_read(tmp_path: Path) -> None:
    asked = [
        {"question": "who?", "answers": [{"text": "Ann", "answer_start": 0}]},
        {"question": "when?", "answers": [], "is_impossible": True},
    ]
    content = {"data": [{"title": "t", "paragraphs": [{"context": "Ann is here", "qas": asked}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(content))
    source = prepared(Answers(files=(str(tmp_path / "squad.json"),)), tmp_path).sources[0]
    assert source.labels is not None
    assert [len(source.labels.values(i)) for i in range(2)] == [2, 0]


def test_the_library_gives_twenty_classes() -> None:
    from lmx.data.builders.stdlib_modules import StdlibModules as Builder

    source = StdlibModules()
    spans = Builder.spans(source)
    small = [span for span in spans if span.path.endswith(("/asyncio/events.py", "/asyncio/tasks.py"))]
    assert len(small) == 2
    found = [record for span in small for record in Builder.records(source, span) if record]
    assert found
    assert all(json.loads(record["example"])["labels"] == ["asyncio"] for record in found)
    assert all(len(record["text"].encode()) <= 400 for record in found)
