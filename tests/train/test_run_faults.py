"""Whole runs of a tiny recipe in this process: what crashes, full disks and bad numbers cost them."""

import errno
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmx.checkpoint import manifest
from lmx.checkpoint.checkpointer import load_subtree
from lmx.decode.generate import Generator
from lmx.errors import LmxError, UserError
from lmx.experiment import Experiment, RunDir
from lmx.optim.schedule import Schedule
from lmx.train.appended import Appended
from lmx.train.loop import Loop
from lmx.train.run import RunOptions, train
from tests.train.runs import STEPS, assert_same, changed, cut_off, lose, metrics, truncate


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
