"""Whole runs of a tiny recipe in this process: what they write, and how they go on."""

import errno
import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lmx.checkpoint import manifest
from lmx.checkpoint.checkpointer import load_subtree
from lmx.checkpoint.config import CheckpointConfig
from lmx.cli.train import describe
from lmx.data.config import DataConfig, LocalFiles, TrainedBpe
from lmx.decode.convert import convert
from lmx.decode.generate import Generator
from lmx.errors import Interrupted, LmxError, UserError
from lmx.experiment import EvalConfig, Experiment, RunDir, SampleConfig, TrainConfig
from lmx.files import write_json
from lmx.models.families.llama import Llama
from lmx.optim.schedule import Schedule
from lmx.train import run as run_module
from lmx.train.appended import Appended
from lmx.train.loop import Loop
from lmx.train.metrics import MetricsLog
from lmx.train.run import RunOptions, train
from lmx.train.rundir import locked

TIMES = ("step_seconds", "tokens_per_second", "eval_seconds")
STEPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for index in range(40):
        words = rng.choice(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "by"], size=30)
        (directory / f"{index:02}.txt").write_text(" ".join(words))
    return directory


@pytest.fixture(scope="module")
def tiny(corpus: Path) -> Experiment:
    """Evaluates and saves every 4 steps; the batch is a multiple of the 8 devices."""
    sizes = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "hidden": 32}
    return Experiment(
        model=Llama(vocab=300, context=32, tied=True, **sizes),
        data=DataConfig((LocalFiles(files=(str(corpus),)),), TrainedBpe(vocab_size=300), held_out=0.2),
        schedule=Schedule(peak=1e-2, warmup=2),
        train=TrainConfig(steps=STEPS, batch=8, length=32, log_every=1, ema=0.5, remat="none"),
        eval=EvalConfig(every=4, rows=8),
        sample=SampleConfig(every=6, prompts=("the", "a"), tokens=3),
        checkpoint=CheckpointConfig(every=4, keep=3),
    )


@pytest.fixture(scope="module")
def finished(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, Any]]:
    """A run that nothing disturbed, and its summary."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    return RunDir(path), train(tiny, path)


@pytest.fixture
def copy(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A copy of the finished run to spoil; reports are drawn elsewhere."""
    monkeypatch.setattr(run_module, "_report", lambda run: {})
    shutil.copytree(finished[0].path, tmp_path / "copy")
    return RunDir(tmp_path / "copy")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(run_module, "_report", lambda run: {})
    return RunDir(tmp_path / "fresh")


def metrics(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def learned(run: RunDir) -> list[dict[str, Any]]:
    """The metrics that do not depend on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(run)]


def arrays(run: RunDir, part: str, step: int = STEPS) -> list[bytes]:
    state = load_subtree(run.checkpoints, part, step=step).state
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def assert_same(run: RunDir, expected: RunDir) -> None:
    assert learned(run) == learned(expected)
    for part in ("params", "optimizer", "ema"):
        assert arrays(run, part) == arrays(expected, part)
    assert run.samples.read_text() == expected.samples.read_text()


def changed(experiment: Experiment, part: str, **values: Any) -> Experiment:
    return replace(experiment, **{part: replace(getattr(experiment, part), **values)})


def stop_after_logging(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A SIGTERM that comes when the metrics of ``step`` have been written: while the next one is computed."""
    write = MetricsLog.write

    def stopping(self: MetricsLog, at: int, values: Any) -> None:
        write(self, at, values)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", stopping)


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


def lose(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)


def truncate(checkpoint: Path) -> None:
    file = max((f for f in checkpoint.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def cut_off(checkpoint: Path) -> None:
    (checkpoint / manifest.FILE).unlink()
    (checkpoint.parent / "saving").write_text(f"{checkpoint.name}\n")


def test_a_crashed_run_goes_on_from_its_local_checkpoint_and_tells_where_its_time_went(
    tiny: Experiment, finished: Any, fresh: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    local = fresh.path.parent / "ssd"
    often = replace(tiny, checkpoint=replace(tiny.checkpoint, local_directory=str(local), local_every=1))
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_note", crash_at(8))
        with pytest.raises(RuntimeError, match="crashed at step 8"):
            train(often, fresh.path)
    assert len(list(local.glob("*/process-0/*/manifest.json"))) == 2
    summary = train(often, fresh.path)
    assert "going on after step 7, from the local checkpoints" in capfd.readouterr().err
    assert_same(fresh, finished[0])
    assert not list(local.glob("*/*"))
    spent = summary["goodput"]["seconds"]
    assert summary["goodput"]["attempts"] == 2
    assert sum(spent.values()) == pytest.approx(summary["goodput"]["wall_seconds"])
    assert all(spent[kind] > 0 for kind in ("steps", "start_up", "compile", "evaluation", "checkpoint", "restart"))
    assert json.loads(fresh.summary.read_text())["goodput"] == summary["goodput"]


def test_a_change_of_the_model_that_its_checkpoints_do_not_allow_leaves_the_run_as_it_was(
    tiny: Experiment, copy: RunDir
) -> None:
    before = copy.experiment.read_text()
    with pytest.raises(UserError, match="does not fit this model"):
        train(changed(tiny, "model", hidden=48), copy.path, RunOptions(allowed_changes=["model"]))
    assert copy.experiment.read_text() == before


def crash_at(step: int) -> Any:
    note = Loop._note

    def crashing(self: Loop, ready: Any, *more: Any) -> None:
        if ready is not None and ready[0] == step:
            raise RuntimeError(f"crashed at step {step}")
        note(self, ready, *more)

    return crashing


@pytest.mark.parametrize("damage", [lose, truncate, cut_off])
def test_without_its_newest_checkpoint_a_run_repeats_the_steps_since_the_one_before(
    tiny: Experiment, finished: Any, copy: RunDir, damage: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(copy.checkpoints / str(STEPS))
    with copy.metrics.open("a") as file:
        file.write('{"step": 13, "loss": 0.5}\n{"step": 14, "lo')  # the crash cut the last line off
    train(tiny, copy.path)
    assert "going on after step 8" in capfd.readouterr().err
    assert_same(copy, finished[0])


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


def test_gradients_that_stay_infinite_end_the_run_with_step_layer_and_documents(
    tiny: Experiment, fresh: RunDir, corpus: Path
) -> None:
    absurd = replace(tiny, schedule=Schedule(peak=1e38, warmup=0))
    with pytest.raises(LmxError, match="was not finite in 3 steps in a row") as caught:
        train(changed(absurd, "train", max_skipped=3), fresh.path)
    message = str(caught.value)
    assert message.startswith("step 4:")
    assert "the first gradient that is not is that of layer 1 (row 1 of stack/segment_0/block_0/*)" in message
    assert str(corpus) in message
    assert [line["skipped_in_a_row"] for line in metrics(fresh)] == [0, 1, 2, 3]


def test_a_full_disk_costs_the_new_checkpoint_only(
    tiny: Experiment, copy: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    longer, options = changed(tiny, "train", steps=16), RunOptions(("train.steps",))
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        with pytest.raises(LmxError, match="the disk is full"):
            train(longer, copy.path, options)
    assert load_subtree(copy.checkpoints, "params").step == STEPS
    assert train(longer, copy.path)["steps"] == 16


def test_a_save_that_failed_is_noticed_at_the_next_step_which_is_saved(
    tiny: Experiment, finished: Any, fresh: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    between, write = Loop._between, manifest.write

    def full(*_: Any) -> None:
        monkeypatch.setattr(manifest, "write", write)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def patient(self: Loop, done: int, state: Any) -> bool:
        while self.checkpointer._pending and not self.checkpointer._pending[1].done():
            time.sleep(0.01)
        return between(self, done, state)

    monkeypatch.setattr(manifest, "write", full)
    monkeypatch.setattr(Loop, "_between", patient)
    with pytest.raises(LmxError, match=r"step 4 was not saved in .* the disk is full.*\(step 5 was saved\)"):
        train(tiny, fresh.path)
    train(tiny, fresh.path)
    assert_same(fresh, finished[0])


def test_what_fails_in_sampling_costs_no_step_and_is_done_again(
    tiny: Experiment, finished: Any, copy: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy.checkpoints / str(STEPS))
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "generate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tiny, copy.path)
    train(tiny, copy.path)
    assert_same(copy, finished[0])
    assert [line["step"] for line in metrics(copy)] == list(range(1, STEPS + 1))


def test_a_prompt_that_does_not_fit_is_refused_before_training(tiny: Experiment, fresh: RunDir) -> None:
    with pytest.raises(UserError, match=r"sample\.prompts: prompt 1 has \d+ tokens, which with 3 new ones exceeds"):
        train(changed(tiny, "sample", prompts=("the", "the cat " * 30)), fresh.path)
    assert not fresh.metrics.exists()


def test_a_full_disk_under_the_metrics_saves_the_run_ends_it_and_loses_no_line(
    tiny: Experiment, finished: Any, fresh: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Appended.add

    def full(self: Appended, record: bytes) -> None:
        if self._path == fresh.metrics and (b'"step": 6' in record or self.left):
            self.left += record
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        add(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Appended, "add", full)
        with pytest.raises(LmxError, match=r"metrics\.jsonl could not be written: No space.* saved after step 7"):
            train(tiny, fresh.path)
    assert [line["step"] for line in metrics(fresh)] == [1, 2, 3, 4, 5]
    train(tiny, fresh.path)
    assert_same(fresh, finished[0])
