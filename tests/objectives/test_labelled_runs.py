"""Labelled examples from files to rows, through a run, and back by the names of their classes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import lmx
from lmx.checkpoint.graft import graft
from lmx.data.config import Chats, DataConfig, LabelledTexts, RatedTexts, TextPairs, TokenizerFile, TrainedBpe
from lmx.data.framing import as_prompted
from lmx.data.prepare import prepare
from lmx.data.rows import held_out_rows, train_rows
from lmx.decode.classified import classified
from lmx.decode.convert import convert
from lmx.decode.frozen import load_frozen
from lmx.decode.loaded import Model
from lmx.decode.sources import open_source
from lmx.errors import UserError
from lmx.eval.metrics.classification import classification_measures
from lmx.eval.metrics.regression import regression_measures
from lmx.eval.perplexity import evaluate
from lmx.experiment import EvalConfig, Experiment, TrainConfig
from lmx.models.config_map import Task
from lmx.models.families.bert import Bert
from lmx.models.families.llama import Llama
from lmx.models.families.modernbert import ModernBert
from lmx.models.model import param_shapes
from lmx.objectives.chat import ChatSft
from lmx.objectives.class_distillation import ClassDistillation
from lmx.objectives.classification import Classification, Regression
from lmx.objectives.objective import Objective
from lmx.objectives.seq_to_seq import SeqToSeq
from lmx.optim.schedule import Schedule
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Sharding
from lmx.train.check_mesh import check_mesh
from lmx.train.run import train
from lmx.train.start import fresh_state
from tests.jitted import init_params

ROWS = [
    {"text": f"{word} " * (1 + i % 5) + f"number {i}", "other": f"and {i}", "label": word}
    for i, word in enumerate(["red", "green", "blue"] * 14)
]
BERT = Bert(vocab=320, context=64, layers=1, width=16, heads=2, hidden=32, task="sequence_classification", classes=3)
LLAMA = Llama(vocab=320, context=64, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, hidden=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return DataConfig(sources=(LabelledTexts(files=(str(path),)),), tokenizer=TrainedBpe(320), held_out=0.15)


def experiment(data: DataConfig, objective: Objective, model: Any, **changes: Any) -> Experiment:
    settings = TrainConfig(steps=2, batch=8, length=64, remat="none")
    schedule, evaluation = Schedule(warmup=0), EvalConfig(every=0)
    run = Experiment(model=model, data=data, objective=objective, train=settings, schedule=schedule, eval=evaluation)
    return replace(run, **changes)


@pytest.fixture(scope="module")
def run(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("runs") / "run"
    return path, train(experiment(data, Classification(), BERT), path)


def test_an_epoch_has_every_example_once_with_its_class(data: DataConfig) -> None:
    wanted = experiment(replace(data, held_out=0.3), Classification(), BERT)
    prepared = prepare(wanted.data, progress=False)
    layout = wanted.layout(prepared.tokenizer)
    rows, again = (train_rows(prepared, length=layout, seed=0) for _ in range(2))
    epoch, found = len(prepared.plan(0, "train", layout)), list[tuple[str, str]]()
    held_out = held_out_rows(prepared, length=layout)
    for row in [rows[i] for i in range(epoch)] + [held_out[i] for i in range(len(held_out))]:
        for segment in range(1, row["segment_ids"].max() + 1):
            tokens = row["tokens"][row["segment_ids"] == segment]
            assert tokens[0] == prepared.tokenizer.end_id
            found.append((prepared.tokenizer.decode(tokens), prepared.classes[row["labels"][segment - 1] - 1]))
    assert sorted(found) == sorted((row["text"], row["label"]) for row in ROWS)
    backwards = {i: again[i] for i in reversed(range(2 * epoch))}
    assert all(np.array_equal(rows[i][k], backwards[i][k]) for i in range(2 * epoch) for k in rows[i])


def test_pairs_of_columns_are_read_by_seq_to_seq(data: DataConfig) -> None:
    source = TextPairs(files=data.sources[0].files, source_column="text", target_column="other")  # type: ignore[attr-defined]
    wanted = experiment(replace(data, sources=(source,)), SeqToSeq(), LLAMA)
    prepared = prepare(wanted.data, progress=False)
    row = train_rows(prepared, length=wanted.layout(prepared.tokenizer), seed=0)[0]
    place = (row["segment_ids"] == 1) & (row["prefix"] == 1)
    text = prepared.tokenizer.decode(row["tokens"][place])
    target = prepared.tokenizer.decode(row["targets"][row["target_segments"] == 1])
    assert {"text": text, "other": target} in [{k: r[k] for k in ("text", "other")} for r in ROWS]


def test_what_the_data_has_and_the_model_expects_are_compared_before_training(data: DataConfig) -> None:
    def plan(objective: Objective, model: Any, sources: Any = data.sources) -> None:
        wanted = experiment(replace(data, sources=sources), objective, model)
        prepared = prepare(wanted.corpus, progress=False)
        prepared.plan(0, "train", wanted.layout(prepared.tokenizer))

    with pytest.raises(UserError, match=r"has 3 classes \(blue, green, red\), but model.classes is 5"):
        plan(Classification(), replace(BERT, classes=5))
    with pytest.raises(UserError, match="has texts with classes, but the objective learns from chats: use Chats"):
        plan(ChatSft(), LLAMA)
    files = data.sources[0].files  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="'green', which is none of the source's 2 classes"):
        plan(Classification(), BERT, (LabelledTexts(files=files, classes=("red", "blue")),))


@pytest.mark.parametrize(("longer", "count"), [("truncate", "truncated"), ("drop", "left_out")])
def test_longer_examples_are_counted_and_told(data: DataConfig, longer: Any, count: str) -> None:
    wanted = experiment(data, Classification(longer=longer), BERT)
    wanted = replace(wanted, train=replace(wanted.train, length=8))
    prepared = prepare(wanted.data, progress=False)
    layout = wanted.layout(prepared.tokenizer)
    number = prepared.stats(layout)["sources"]["labelled_texts"][count]
    sizes = [len(prepared.tokenizer.encode(row["text"])) + 1 for row in ROWS]
    assert number == sum(size > 8 for size in sizes) > 0
    assert f"{number} of {len(ROWS)} are" in prepared.notes(layout)[1]


def test_a_run_names_its_classes(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, summary = run
    assert 0 <= summary["eval_accuracy"] <= 1
    assert 0 < summary["eval_baseline_accuracy"] < 1
    assert 0 <= summary["eval_f1"] <= 1
    assert "eval_bits_per_byte" not in summary
    model = lmx.load(path)
    assert model.classes == ("blue", "green", "red")
    text = ROWS[0]["text"]
    assert model.tokenize([text])[0].ids[0] == model.prompts.texts.end_id  # as in the rows that it learned from
    (found,) = model.classify([text])
    scores = np.asarray(model.scores([text]), np.float64)[0]
    expected = np.exp(scores) / np.exp(scores).sum()
    assert list(found.probabilities) == ["blue", "green", "red"]
    np.testing.assert_allclose(list(found.probabilities.values()), expected, rtol=1e-5)
    assert found.labels == (found.label,) == (model.classes[expected.argmax()],)
    convert(path, tmp_path / "hf", "hf")
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert content["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert content["problem_type"] == "single_label_classification"
    assert lmx.load(tmp_path / "hf").classify([text])[0].label == found.label
    numbers = {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}}  # what stands there where nobody gave names
    assert replace(open_source(tmp_path / "hf"), entries=numbers).classes == ()


def test_a_run_of_classes_has_its_correlation_and_calibration(
    run: tuple[Path, dict[str, Any]], data: DataConfig
) -> None:
    model, labels = lmx.load(run[0]), {row["text"]: row["label"] for row in ROWS}
    texts = list(prepare(data, progress=False).texts("held_out"))
    expected = np.array([model.classes.index(labels[text]) for text in texts])
    scores, found = np.asarray(model.scores(texts), np.float64), evaluate(model, data)
    alone = classification_measures(expected, np.exp(scores) / np.exp(scores).sum(1, keepdims=True))
    measures = found.result.measures
    for name in ("accuracy", "matthews", "calibration_error"):
        assert measures[name].value == pytest.approx(alone[name].value, abs=1e-5)
        assert measures[name].stderr == pytest.approx(alone[name].stderr, abs=1e-5)
    for name in ("loss", "accuracy", "f1"):
        assert measures[name].value == pytest.approx(run[1][f"eval_{name}"], rel=1e-5)
        assert measures[name].value == pytest.approx(getattr(found, name), rel=1e-5)
    assert found.result.n == measures["f1"].n == len(texts)
    assert measures["f1"].stderr > 0


def test_a_run_of_numbers_has_its_errors_and_correlations(data: DataConfig, tmp_path: Path) -> None:
    rated = [{"text": row["text"], "label": [i % 5, -i]} for i, row in enumerate(ROWS)]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    source = RatedTexts(files=(str(tmp_path / "rated.jsonl"),))
    wanted = experiment(replace(data, sources=(source,), held_out=1.0), Regression(), replace(BERT, classes=2))
    tokenizer = as_prompted(prepare(wanted.corpus, progress=False).tokenizer, before=True)
    model = Model(wanted.model, init_params(wanted.model.spec(), jax.random.key(1)), tokenizer, experiment=wanted)
    predicted = np.asarray(model.scores([row["text"] for row in rated]), np.float64)
    alone, found = (
        regression_measures(np.array([row["label"] for row in rated], float), predicted),
        evaluate(model, wanted.corpus),
    )
    for name, measure in alone.items():
        assert found.result.measures[name].value == pytest.approx(measure.value, abs=1e-4)
    assert found.result.measures["loss"].value == pytest.approx(found.loss, rel=1e-5)
    assert found.result.n == len(ROWS)


def test_a_teacher_tells_the_same_classes(run: tuple[Path, dict[str, Any]], data: DataConfig) -> None:
    objective = ClassDistillation(teacher=str(run[0]))
    wanted = experiment(data, objective, replace(BERT, width=32, heads=4))
    wanted.check()
    sharding = Sharding(build_mesh(MeshConfig(data=1), jax.devices()[:1]), wanted.rules)
    prepared = prepare(data, progress=False)
    frozen = load_frozen(wanted, sharding, prepared)
    assert frozen["teacher"].spec == BERT.spec()
    tokenizer = TokenizerFile(str(run[0] / "tokenizer"))
    source = replace(data.sources[0], classes=("red", "green", "blue"))  # type: ignore[call-arg]
    other = prepare(replace(data, sources=(source,), tokenizer=tokenizer), progress=False)
    with pytest.raises(UserError, match=r"tells 3 classes \(blue, green, red\), .* has 3 \(red, green, blue\)"):
        load_frozen(wanted, sharding, other)
    with pytest.raises(UserError, match="both must have the same"):
        load_frozen(replace(wanted, model=replace(BERT, classes=4)), sharding, prepared)


def test_several_classes_may_hold() -> None:
    one, none = classified([[2.0, -1.0, 0.5], [-1.0, -2.0, -3.0]], ("a", "b", "c"), several=True)
    assert one.labels == ("a", "c")
    assert one.label == "a"
    assert none.labels == ()


def test_another_head_starts_fresh_and_it_is_said(run: tuple[Path, dict[str, Any]], data: DataConfig) -> None:
    tagging = replace(BERT, task="token_classification", classes=4)
    wanted = experiment(data, Classification(), tagging, init_from=str(run[0]))
    sharding = Sharding(build_mesh(MeshConfig(data=1), jax.devices()[:1]), wanted.rules)
    state, _, notes = fresh_state(wanted, sharding, prepare(wanted.corpus).tokenizer)
    assert "tasks/classes/out/bias, tasks/classes/out/kernel start fresh" in notes[0]
    assert "tasks/classes/transform/dense/kernel" in notes[0].split("start fresh")[1]
    given = lmx.load(run[0]).params
    np.testing.assert_array_equal(state.params["embedding"]["table"], given["embedding"]["table"])
    assert state.params["tasks"]["classes"]["out"]["kernel"].shape == (16, 4)


def test_a_graft_takes_all_but_heads() -> None:
    own, other = BERT, replace(BERT, task="token_prediction")
    found = graft(*(param_shapes(model.spec()) for model in (own, other)))
    assert found is not None
    assert all(name.startswith("tasks/classes") for name in found.fresh)
    assert all(name.startswith("head/") for name in found.left)
    mine, theirs = (init_params(m.spec(), jax.random.key(i)) for i, m in enumerate((own, other)))
    joined = found.joined(mine, theirs)
    ours, expected = (tree["tasks"]["classes"]["out"]["kernel"] for tree in (joined, mine))
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(joined["embedding"]["table"], theirs["embedding"]["table"])
    wider = replace(other, hidden=64)
    assert graft(param_shapes(own.spec()), param_shapes(wider.spec())) is None


@pytest.mark.parametrize("task", ["sequence_classification", "embedding"])
def test_a_graft_takes_the_pooler_of_another_head(task: Task) -> None:
    own, other = replace(BERT, task=task), replace(BERT, task="pretraining")
    found = graft(*(param_shapes(model.spec()) for model in (own, other)))
    assert found is not None
    assert not any("transform" in name for name in found.fresh)
    assert not any(name.startswith("tasks/nsp/transform") for name in found.left)
    assert "/transform/dense/kernel from tasks/nsp/transform/dense/bias" in found.note
    mine, theirs = (init_params(m.spec(), jax.random.key(i)) for i, m in enumerate((own, other)))
    (head,) = found.joined(mine, theirs)["tasks"].values()
    for part, given in theirs["tasks"]["nsp"]["transform"]["dense"].items():
        np.testing.assert_array_equal(head["transform"]["dense"][part], given)
    if task == "sequence_classification":
        np.testing.assert_array_equal(head["out"]["kernel"], mine["tasks"]["classes"]["out"]["kernel"])


def test_a_pooler_of_another_form_is_not_taken_in_part() -> None:
    sizes = {"vocab": 300, "context": 64, "layers": 1, "width": 16, "heads": 2, "hidden": 32}
    own, other = (ModernBert(task=t, classes=3, **sizes) for t in ("sequence_classification", "pretraining"))
    found = graft(*(param_shapes(model.spec()) for model in (own, other)))
    assert found is not None
    assert not found.pooler
    assert "tasks/classes/transform/dense/kernel" in found.fresh


def test_a_run_learns_a_chat_and_answers_in_it(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": [chat[0] | {"content": f"hello {i}"}, chat[1]]}) + "\n" for i in range(12))
    )
    source = Chats(files=(str(tmp_path / "chats.jsonl"),), template="chatml")
    config = DataConfig(sources=(source,), tokenizer=TrainedBpe(320), held_out=0.2)
    summary = train(experiment(config, ChatSft(), LLAMA), tmp_path / "run")
    assert summary["eval_loss"] > 0
    model = lmx.load(tmp_path / "run")
    assert model.chat_text(chat[:1]) == "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"
    assert model.prompts.texts.token_id("<|im_end|>") in model.defaults.stops


def test_chats_that_are_cut_before_what_is_learned_are_counted_and_refused(tmp_path: Path) -> None:
    """Every second one has a short turn first; the rest of all takes more than a row."""
    yes = {"role": "assistant", "content": "yes"}
    short = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]
    chats = [[*(short if i % 2 else []), {"role": "user", "content": f"{i} " + "word " * 40}, yes] for i in range(24)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    source = Chats(files=(str(tmp_path / "chats.jsonl"),), template="chatml")
    prepared = prepare(DataConfig(sources=(source,), tokenizer=TrainedBpe(300), held_out=0.2), progress=False)
    every, last, dropped = (
        experiment(DataConfig(), objective, LLAMA, train=TrainConfig(length=48)).layout(prepared.tokenizer)
        for objective in (ChatSft(), ChatSft(turns="last"), ChatSft(longer="drop"))
    )
    found = prepared.stats(every)["sources"]["chats"]
    assert (found["untaught"], found["truncated"]) == (12, 12)
    assert "12 of 24 are left out: truncated to a row, they hold nothing to learn" in " ".join(prepared.notes(every))
    rows = train_rows(prepared, length=every, seed=0)
    assert all((rows[i]["target_segments"] > 0).any() for i in range(len(prepared.plan(0, "train", every))))
    with pytest.raises(UserError, match=r"all \d+ training examples of the source chats hold nothing to learn"):
        train_rows(prepared, length=last, seed=0)
    with pytest.raises(UserError, match=r"all \d+ held-out examples .* take more than the 48 .* raise train\.length"):
        held_out_rows(prepared, length=dropped)


def test_a_mesh_gives_the_same_numbers(data: DataConfig) -> None:
    wanted = experiment(data, Classification(), BERT)
    check_mesh(wanted, [MeshConfig(data=2, sequence=2, tensor=2)], 1).verify()
