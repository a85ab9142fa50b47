import errno
import functools
import logging
import os
import shutil
import subprocess
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.checkpoint import checkpointer as checkpointer_module
from lmx.checkpoint import manifest
from lmx.checkpoint.checkpointer import Checkpointer, load_subtree
from lmx.checkpoint.config import CheckpointConfig
from lmx.errors import LmxError, UserError

many_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (virtual) devices")


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def make_state(seed=0, size=64):
    w = jax.random.normal(jax.random.key(seed), (size, 24))
    params = {"layers": {"w": w, "b": w[0].astype(jnp.bfloat16)}}
    return {
        "params": params,
        "opt": (Moments(jnp.int32(seed), {"w": w * w}), ()),
        "rows": {1: jnp.uint32(seed)},
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def saved(directory, *steps, **options):
    with Checkpointer(directory, CheckpointConfig(**options)) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"step": step, "row": step * 8})
    return checkpointer


def restored(directory, step=None):
    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        return checkpointer.restore(abstract(make_state()), step)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    file.write_bytes(bytes(data))


def test_round_trip_is_bitwise_with_every_container_and_dtype(tmp_path):
    saved(tmp_path, 3)
    back = restored(tmp_path)
    assert same(back.state, make_state(3))
    assert isinstance(back.state["opt"][0], Moments)
    assert (back.step, back.meta, back.skipped) == (3, {"step": 3, "row": 24}, ())


def test_no_checkpoint_is_none(tmp_path):
    assert restored(tmp_path / "new") is None


def test_the_state_may_be_donated_at_once(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state):
        return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)

    state = train_step(make_state(size=4096))
    with Checkpointer(tmp_path, CheckpointConfig(keep=9)) as checkpointer:
        expected = {}
        for step in range(1, 6):
            expected[step] = jax.tree.map(lambda x: np.array(x, copy=True), state)
            checkpointer.save(step, state, {})
            for _ in range(3):
                state = train_step(state)
        target = abstract(state)
        for step, value in expected.items():
            assert same(checkpointer.restore(target, step).state, value)


def test_saving_while_one_is_in_flight_drops_neither(tmp_path):
    assert saved(tmp_path, *range(1, 6), keep=9).steps() == (1, 2, 3, 4, 5)


def test_the_step_that_stands_is_written_again_only_by_force(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.save(1, make_state(1), {"take": 1})
        checkpointer.save(1, make_state(1), {"take": 2})
        assert checkpointer.restore(abstract(make_state())).meta == {"take": 1}
        checkpointer.save(1, make_state(1), {"take": 3}, force=True)
        assert checkpointer.restore(abstract(make_state())).meta == {"take": 3}


def test_keep_rules(tmp_path):
    assert saved(tmp_path, 10, 20, 30, 40, 50, keep=2, keep_every=20).steps() == (20, 40, 50)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "40", "50"]


def test_going_back_gives_up_the_later_steps(tmp_path):
    saved(tmp_path, 10, 20, 30, keep=3)
    with Checkpointer(tmp_path, CheckpointConfig(keep=1)) as checkpointer:
        assert checkpointer.restore(abstract(make_state()), 10).step == 10
        checkpointer.save(15, make_state(15), {})
    assert checkpointer.steps() == (15,)


def test_a_damaged_step_does_not_count_as_one_that_is_kept(tmp_path):
    saved(tmp_path, 10, 20, 30)
    flip(tmp_path / "30" / "meta.json", 9)
    with Checkpointer(tmp_path, CheckpointConfig(keep=2)) as checkpointer:
        assert checkpointer.restore(abstract(make_state())).step == 20
        checkpointer.save(35, make_state(35), {})
    assert checkpointer.steps() == (20, 35)


def test_damage_falls_back_to_the_step_before_and_says_why(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    saved(tmp_path, 5, keep=9)
    (tmp_path / "5" / "manifest.json").unlink()
    (tmp_path / "4" / "meta.json").write_text("{}")
    largest = max((tmp_path / "3").rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    back = restored(tmp_path)
    assert back.step == 2
    assert same(back.state, make_state(2))
    assert [step for step, _ in back.skipped] == [5, 4, 3]
    assert "manifest.json is missing" in back.skipped[0][1]
    assert "meta.json has 2 bytes" in back.skipped[1][1]
    assert largest.name in back.skipped[2][1]
    with pytest.raises(LmxError, match=r"step 4: meta\.json"):
        restored(tmp_path, 4)
    with pytest.raises(UserError, match="no checkpoint of step 9"):
        restored(tmp_path, 9)


def test_a_flipped_bit_in_any_file_is_found(tmp_path):
    saved(tmp_path, 1, 2)
    files = [p for p in (tmp_path / "2").rglob("*") if p.is_file() and p.stat().st_size]
    assert {"manifest.json", "meta.json", "_METADATA", "manifest.ocdbt"} <= {p.name for p in files}
    for number, file in enumerate(files):
        good = file.read_bytes()
        flip(file, 7919 * (number + 1))
        assert restored(tmp_path).step == 1, file
        file.write_bytes(good)
    assert restored(tmp_path).step == 2


def test_nothing_good_is_an_error_that_lists_the_reasons(tmp_path):
    saved(tmp_path, 1, 2)
    flip(tmp_path / "1" / "meta.json", 9)
    (tmp_path / "2" / "manifest.json").unlink()
    with pytest.raises(LmxError, match=r"step 2: manifest\.json is missing; step 1: .*meta\.json"):
        restored(tmp_path)


def test_a_first_save_that_was_cut_off_counts_as_none(tmp_path):
    saved(tmp_path, 4)
    (tmp_path / "4" / "manifest.json").unlink()
    (tmp_path / "saving").write_text("4\n")
    assert restored(tmp_path) is None
    assert saved(tmp_path, 3).steps() == (3,)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3"]


def test_a_state_of_another_model_is_refused_by_name(tmp_path):
    saved(tmp_path, 1)
    target = abstract(make_state(size=32))
    target["params"]["layers"]["extra"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    with (
        Checkpointer(tmp_path, CheckpointConfig()) as checkpointer,
        pytest.raises(UserError, match=r"layers/extra is missing; .*w is float32\[64,24\], expected float32\[32,24\]"),
    ):
        checkpointer.restore(target)


def test_dtypes_are_never_cast(tmp_path):
    saved(tmp_path, 1)
    target = abstract(make_state())
    target["params"]["layers"]["b"] = jax.ShapeDtypeStruct((24,), jnp.float32)
    with (
        Checkpointer(tmp_path, CheckpointConfig()) as checkpointer,
        pytest.raises(UserError, match=r"params/layers/b is bfloat16\[24\], expected float32\[24\]"),
    ):
        checkpointer.restore(target)


def test_a_part_loads_alone(tmp_path):
    saved(tmp_path, 1, 2)
    part = load_subtree(tmp_path, "params")
    assert same(part.state, make_state(2)["params"])
    assert part.meta["step"] == 2
    wanted = abstract(make_state()["params"]["layers"])
    assert same(load_subtree(tmp_path, "params/layers", wanted, step=1).state, make_state(1)["params"]["layers"])
    assert load_subtree(tmp_path, "rows/1").state == 2
    with pytest.raises(UserError, match="no part 'ema'; its parts are: opt, params, rows"):
        load_subtree(tmp_path, "ema")
    with pytest.raises(UserError, match="there is no checkpoint in"):
        load_subtree(tmp_path / "nowhere", "params")


@many_devices
def test_restores_onto_another_mesh(tmp_path):
    saved(tmp_path, 1)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    spread = NamedSharding(mesh, P("fsdp", "tensor"))
    target = abstract(make_state())
    target["params"]["layers"]["w"] = jax.ShapeDtypeStruct((64, 24), jnp.float32, sharding=spread)
    target["params"]["layers"]["b"] = jax.ShapeDtypeStruct((24,), jnp.bfloat16)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        back = checkpointer.restore(target)
        assert same(back.state, make_state(1))
        assert back.state["params"]["layers"]["w"].sharding == spread
        checkpointer.save(2, back.state, {})
    assert same(restored(tmp_path).state, make_state(1))
    part = load_subtree(tmp_path, "params", sharding=NamedSharding(mesh, P()))
    assert len(part.state["layers"]["b"].sharding.device_set) == 8


def test_a_failed_save_is_told_at_the_next_call_and_may_be_tried_again(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "write", no_space)
            checkpointer.save(2, make_state(2), {})
            with pytest.raises(LmxError, match=r"step 2 was not saved in .* the disk is full"):
                checkpointer.wait()
        assert checkpointer.steps() == (1,)
        checkpointer.save(2, make_state(2), {})
    assert restored(tmp_path).step == 2


def test_after_a_failed_save_the_next_is_completed_before_it_is_raised(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "write", no_space)
            checkpointer.save(2, make_state(2), {})
            while not checkpointer.failing:
                time.sleep(0.01)
        with pytest.raises(LmxError, match=r"step 2 was not saved in .* the disk is full.*\(step 3 was saved\)"):
            checkpointer.save(3, make_state(3), {})
        assert not checkpointer.failing
    assert checkpointer.steps() == (1, 3)


def test_a_failed_save_leaves_nothing_of_its_own_behind(tmp_path, monkeypatch, caplog):
    def cut_off(path, *_, **__):
        path.with_name(f"{path.name}.orbax-checkpoint-tmp").mkdir()
        no_space()

    saved(tmp_path, 1)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        monkeypatch.setattr(checkpointer_module.v1, "save_async", cut_off)
        checkpointer.save(2, make_state(2), {})
        with pytest.raises(LmxError, match=r"step 2 was not saved in .* the disk is full"):
            checkpointer.wait()
        assert not list(tmp_path.glob("*.orbax-checkpoint-tmp*"))
        (tmp_path / "2.orbax-checkpoint-tmp").mkdir()  # Orbax's threads may still be writing
    assert not list(tmp_path.glob("*.orbax-checkpoint-tmp*"))
    logging.getLogger("absl").error("_SignalingThread.run() raised an exception: it is raised too")
    assert not caplog.records


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path):
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    try:
        saved(tmp_path / "run", 1)
        with Checkpointer(tmp_path / "run", CheckpointConfig()) as checkpointer:
            for step in (2, 3):
                checkpointer.save(step, make_state(step, size=40_000), {})
                with pytest.raises(LmxError, match=f"step {step} was not saved in .*: the disk is full"):
                    checkpointer.wait()
            checkpointer.save(4, make_state(4), {})
        assert checkpointer.steps() == (1, 4)
        assert same(restored(tmp_path / "run").state, make_state(4))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture
def failed_elsewhere(monkeypatch):
    """The first save fails on another process: here, inside Orbax, it ends long after that is told."""
    release, told, finish = threading.Event(), [], Checkpointer._finish

    def finish_late(self, step, written, note):
        if step == 3:
            release.wait(60)
        else:
            finish(self, step, written, note)

    def posted(topic):
        told.append(topic)
        return {1: "the disk is full"} if topic == "save-1-failed" else {}

    monkeypatch.setattr(checkpointer_module, "count", lambda: 2)
    monkeypatch.setattr(checkpointer_module, "posted", posted)
    monkeypatch.setattr(Checkpointer, "_finish", finish_late)
    yield told
    release.set()


def test_a_save_that_failed_on_another_process_is_not_waited_for(tmp_path, failed_elsewhere):
    """Orbax would wait for that process, for ten minutes."""
    began = time.monotonic()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(3, {"w": jnp.zeros(4)}, {})
    with pytest.raises(LmxError, match=r"step 3 was not saved in .* the disk is full"):
        checkpointer.close()
    assert time.monotonic() - began < 20
    assert failed_elsewhere == ["save-1-failed"]


def test_the_state_is_saved_after_one_that_failed_on_another_process(tmp_path, failed_elsewhere):
    """The thread that still waits inside Orbax does not stand in its way."""
    began = time.monotonic()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(3, {"w": jnp.zeros(4)}, {})
    with pytest.raises(LmxError, match=r"step 3 was not saved in .* the disk is full \(step 4 was saved\)"):
        checkpointer.save(4, {"w": jnp.ones(4)}, {})
    assert time.monotonic() - began < 20
    assert checkpointer.steps() == (4,)
    checkpointer.close()
