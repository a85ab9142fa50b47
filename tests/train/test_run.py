"""Whole runs of a tiny recipe in this process: what they write, and how they go on."""

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmx.checkpoint.checkpointer import load_subtree
from lmx.checkpoint.config import CheckpointConfig
from lmx.cli.train import describe
from lmx.decode.convert import convert
from lmx.errors import Interrupted, UserError
from lmx.experiment import EvalConfig, Experiment, RunDir
from lmx.files import write_json
from lmx.optim.schedule import Schedule
from lmx.train.run import RunOptions, train
from lmx.train.rundir import locked
from tests.train.runs import STEPS, arrays, assert_same, changed, cut_off, lose, metrics, stop_after_logging


def test_metrics_have_one_line_a_step_and_evaluations_in_theirs(finished: Any) -> None:
    run, _ = finished
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        wanted = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "step_seconds"}
        assert wanted <= set(line)
        evaluated = {"eval_loss", "eval_perplexity", "eval_bits_per_byte"} & set(line)
        assert len(evaluated) == (3 if line["step"] % 4 == 0 else 0)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["eval_perplexity"] == pytest.approx(np.exp(lines[-1]["eval_loss"]))


def test_the_run_directory_holds_what_the_summary_says(finished: Any, tiny: Experiment) -> None:
    run, summary = finished
    assert run.load_experiment() == tiny
    assert summary["steps"] == STEPS
    assert summary["tokens"] == STEPS * 8 * 32
    assert summary["eval_loss"] == metrics(run)[-1]["eval_loss"]
    assert Path(summary["report"]).read_text().startswith("<!")
    samples = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [(6, "the"), (6, "a"), (12, "the"), (12, "a")]
    assert any((run.path / "tensorboard").iterdir())
    mesh = json.loads(run.fingerprint.read_text())["mesh"]
    assert {name: size for name, size in mesh.items() if size > 1} == {"data": 8}


def test_log_every_thins_the_lines_out(tiny: Experiment, fresh: RunDir) -> None:
    train(changed(tiny, "train", log_every=5), fresh.path)
    assert [line["step"] for line in metrics(fresh)] == [1, 4, 5, 8, 10, 12]


@pytest.mark.parametrize("logged", [3, 5])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    tiny: Experiment, finished: Any, fresh: RunDir, monkeypatch: pytest.MonkeyPatch, logged: int
) -> None:
    """After step 4 an evaluation is due too, after 6 samples are."""
    with monkeypatch.context() as patch:
        stop_after_logging(patch, logged)
        with pytest.raises(Interrupted, match=f"SIGTERM after step {logged + 1}"):
            train(tiny, fresh.path)
    assert [line["step"] for line in metrics(fresh)] == list(range(1, logged + 2))
    train(tiny, fresh.path)
    assert_same(fresh, finished[0])


def test_a_run_stopped_while_it_is_profiled_leaves_its_trace_and_the_rest_of_it_later(
    tiny: Experiment, fresh: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after_logging(patch, 3)
        with pytest.raises(Interrupted):
            train(tiny, fresh.path, RunOptions(profile=(2, 5)))
    assert len(list(fresh.path.rglob("*.xplane.pb"))) == 1
    time.sleep(1)  # a trace is named after the second in which it began
    train(tiny, fresh.path, RunOptions(profile=(2, 5)))
    assert len(list(fresh.path.rglob("*.xplane.pb"))) == 2


@pytest.mark.parametrize("steps", [(0, 3), (5, 2), (2, STEPS + 1)])
def test_steps_that_cannot_be_profiled_are_refused(tiny: Experiment, fresh: RunDir, steps: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"--profile is {steps[0]} {steps[1]}, expected .* from 1 to train.steps"):
        train(tiny, fresh.path, RunOptions(profile=steps))


def test_steps_that_a_run_has_behind_it_are_not_profiled(tiny: Experiment, copy: RunDir) -> None:
    with pytest.raises(UserError, match="--profile is 2 3, but the run goes on after step 12"):
        train(tiny, copy.path, RunOptions(profile=(2, 3)))
    (copy.path / "profile").mkdir()  # unless they were, by the command that now goes on
    assert train(tiny, copy.path, RunOptions(profile=(2, 3)))["steps"] == STEPS


def test_a_finished_run_started_again_changes_nothing(tiny: Experiment, finished: Any, copy: RunDir) -> None:
    before = {f: f.read_bytes() for f in (copy.metrics, copy.samples, copy.summary)}
    summary = train(tiny, copy.path)
    assert {f: f.read_bytes() for f in before} == before
    assert summary["eval_loss"] == finished[1]["eval_loss"]


def test_a_run_killed_before_its_summary_still_gets_one(tiny: Experiment, finished: Any, copy: RunDir) -> None:
    copy.summary.unlink()
    summary = train(tiny, copy.path)
    kept = ("steps", "tokens", "loss", "eval_loss", "eval_bits_per_byte")
    assert {k: summary[k] for k in kept} == {k: finished[1][k] for k in kept}


def test_a_summary_with_a_loss_that_was_not_finite_is_told_again(tiny: Experiment, copy: RunDir) -> None:
    write_json(copy.summary, json.loads(copy.summary.read_text()) | {"eval_loss": math.nan})
    assert json.loads(copy.summary.read_text())["eval_loss"] is None
    assert "held-out loss nan" in describe(train(tiny, copy.path) | {"report": "here"}, copy.path)


def test_a_change_of_the_model_that_its_checkpoints_do_not_allow_leaves_the_run_as_it_was(
    tiny: Experiment, copy: RunDir
) -> None:
    before = copy.experiment.read_text()
    with pytest.raises(UserError, match="does not fit this model"):
        train(changed(tiny, "model", hidden=48), copy.path, RunOptions(allowed_changes=["model"]))
    assert copy.experiment.read_text() == before


def test_a_change_of_the_training_is_refused_with_the_difference(tiny: Experiment, copy: RunDir) -> None:
    other = changed(tiny, "schedule", peak=0.5)
    before = copy.experiment.read_bytes()
    with pytest.raises(UserError, match=r"schedule\.peak: 0\.01 -> 0\.5") as caught:
        train(other, copy.path)
    assert "--allow-config-change schedule.peak" in str(caught.value)
    assert copy.experiment.read_bytes() == before
    with pytest.raises(UserError, match=r"names model, which does not differ; what differs: schedule\.peak"):
        train(other, copy.path, RunOptions(("schedule", "model")))


def test_an_allowed_change_goes_on_with_it(tiny: Experiment, copy: RunDir) -> None:
    longer = changed(tiny, "train", steps=14)
    assert train(longer, copy.path, RunOptions(("train.steps",)))["steps"] == 14
    assert [line["step"] for line in metrics(copy)] == list(range(1, 15))
    assert copy.load_experiment() == longer


def test_changes_that_learning_does_not_depend_on_are_allowed(tiny: Experiment, copy: RunDir) -> None:
    assert train(changed(tiny, "eval", every=3), copy.path)["steps"] == STEPS


def test_data_that_changed_under_a_run_is_refused_if_it_was_ever_saved(
    tiny: Experiment, copy: RunDir, corpus: Path
) -> None:
    new = corpus / "new.txt"
    new.write_text("a document that was not there before")
    try:
        with pytest.raises(UserError, match=r"the text or the tokenizer changed.*--run-dir"):
            train(tiny, copy.path)
        for step in (4, 8):
            lose(copy.checkpoints / str(step))
        cut_off(copy.checkpoints / "12")
        assert train(changed(tiny, "train", steps=3), copy.path)["steps"] == 3
    finally:
        new.unlink()


def test_a_directory_without_a_run_is_left_alone(tiny: Experiment, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds files but no run"):
        train(tiny, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, expected a directory"):
        train(tiny, tmp_path / "file")
    with pytest.raises(UserError, match=r"--run-dir \S+/file/run cannot be written: \S+/file is no directory"):
        train(tiny, tmp_path / "file" / "run")
    for name in ("directory", "local_directory"):
        elsewhere = changed(tiny, "checkpoint", local_every=int(name != "directory"), **{name: str(tmp_path / "file")})
        with pytest.raises(UserError, match=rf"checkpoint.{name} \S+ cannot be written: \S+/file is no directory"):
            train(elsewhere, tmp_path / name)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_second_trainer_of_the_same_run_is_refused(tiny: Experiment, copy: RunDir) -> None:
    with locked(copy), pytest.raises(UserError, match="another process is training in"):
        train(tiny, copy.path)


def test_init_from_takes_the_averaged_weights_and_nothing_else_and_only_once(
    tiny: Experiment, copy: RunDir, finished: Any, fresh: RunDir
) -> None:
    still = replace(tiny, schedule=Schedule(peak=0.0, warmup=0), init_from=str(copy.path))
    summary = train(changed(still, "train", steps=1), fresh.path)
    shutil.rmtree(copy.path)
    assert train(changed(still, "train", steps=1), fresh.path)["steps"] == 1
    assert summary["steps"] == 1
    assert arrays(fresh, "params", 1) == arrays(finished[0], "ema")
    assert summary["eval_loss"] == pytest.approx(finished[1]["eval_loss"], rel=1e-6)


def test_init_from_takes_a_hugging_face_directory(
    tiny: Experiment, finished: Any, fresh: RunDir, tmp_path: Path
) -> None:
    convert(finished[0].path, tmp_path / "exported", "hf")
    still = replace(tiny, schedule=Schedule(peak=0.0, warmup=0), init_from=str(tmp_path / "exported"))
    summary = train(changed(still, "train", steps=1), fresh.path)
    assert summary["eval_loss"] == pytest.approx(finished[1]["eval_loss"], rel=1e-6)


def test_init_from_another_model_is_refused_with_the_difference(tiny: Experiment, finished: Any, fresh: RunDir) -> None:
    other = replace(tiny, model=replace(tiny.model, hidden=48), init_from=str(finished[0].path))
    with pytest.raises(UserError, match=r"is not this recipe's: hidden: \d+ -> 48"):
        train(other, fresh.path)


def test_early_stopping_ends_the_run_for_good_and_its_best_checkpoint_stays(tiny: Experiment, fresh: RunDir) -> None:
    still = replace(tiny, schedule=Schedule(peak=0.0, warmup=0), eval=EvalConfig(every=2, rows=8, patience=2))
    still = replace(still, checkpoint=CheckpointConfig(every=1, keep=1, keep_best=True))
    first = train(still, fresh.path)
    assert first["steps"] == 6  # the best of step 2 was not beaten twice
    assert first["best_step"] == 2
    assert first["best_eval_loss"] == first["eval_loss"]
    assert "after step 2" in describe(first | {"report": "page.html"}, fresh.path)
    assert {path.name for path in fresh.checkpoints.iterdir()} == {"2", "6"}
    assert load_subtree(fresh.checkpoints, "params", step=2).step == 2
    before = fresh.metrics.read_bytes()
    assert train(still, fresh.path)["steps"] == 6
    assert fresh.metrics.read_bytes() == before
