"""What a step changes, alone and on eight devices, and whole runs of adapters."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import lmx
from lmx.adapters.adapter import Dora, Lora
from lmx.adapters.base import checksum
from lmx.checkpoint.checkpointer import load_subtree
from lmx.checkpoint.config import CheckpointConfig
from lmx.data.config import DataConfig, LocalFiles, TrainedBpe
from lmx.decode.convert import convert
from lmx.errors import UserError
from lmx.experiment import EvalConfig, Experiment, RunDir, SampleConfig, TrainConfig
from lmx.optim.names import name_of, names, pick
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Sharding
from lmx.train import run as run_module
from lmx.train.run import train
from lmx.train.state import init_state, state_shardings
from lmx.train.step import BATCH, jit_step


@pytest.fixture(scope="module")
def experiment(model):
    return Experiment(
        model=model,
        optimizer=AdamW(eps=1e-5),
        schedule=Schedule(peak=1e-2, warmup=0, shape="constant"),
        train=TrainConfig(steps=4, batch=8, length=16, remat="none"),
        init_from="base",
    )


def stepped(experiment: Experiment, batch: dict, base: dict, mesh: tuple[int, int] = (1, 1), steps: int = 2):
    """The state before and after some steps, on the host, and the losses."""
    fsdp, tensor = mesh
    sharding = Sharding(
        build_mesh(MeshConfig(data=1, fsdp=fsdp, tensor=tensor), jax.devices()[: fsdp * tensor]), experiment.rules
    )
    make = functools.partial(init_state, experiment)
    state = jax.jit(make, out_shardings=state_shardings(experiment, sharding))(jax.random.key(1), base)
    before, step, losses = jax.device_get(state), jit_step(experiment, sharding), []
    placed = jax.device_put(batch, sharding.named(BATCH))
    for _ in range(steps):
        state, metrics = step(state, placed)
        losses.append(float(metrics["loss"]))
    return before, state, losses


def flat(tree) -> dict:
    return {name_of(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_only_changed(experiment: Experiment, before, after) -> None:
    for name, leaf in flat(before.params).items():
        same = np.array_equal(leaf, flat(after.params)[name])
        assert same != experiment.trains(name), name


def test_only_the_adapter_moves_and_has_moments(experiment, batch, base):
    adapter = Lora(rank=2, table_rank=2, base="nf4", dropout=0.3, targets=("*mlp*", "*query*"))
    changed = replace(experiment, adapter=adapter)
    changed._check_trained()
    before, state, losses = stepped(changed, batch, base, steps=3)
    assert losses[-1] < losses[0]
    assert_only_changed(changed, before, jax.device_get(state))
    moments = [name for name in flat(state.optimizer) if "/mu/" in name]
    assert len(moments) == len(names(pick(state.params, changed.trains))) == 10
    _, again, _ = stepped(changed, batch, base, mesh=(2, 2), steps=3)
    for name, leaf in flat(state.params).items():
        np.testing.assert_allclose(leaf.astype(np.float32), flat(again.params)[name].astype(np.float32), atol=2e-5)
    kernel = again.params["stack"]["segment_0"]["block_0"]["mlp"]["up"]["kernel"]
    assert kernel.base.codes.sharding.shard_shape(kernel.base.codes.shape) == (2, 4, 16)
    assert kernel.b.sharding.shard_shape(kernel.b.shape) == (2, 2, 16)


def test_frozen_parameters_stay_and_have_no_moments(experiment, batch, base):
    optimizer = AdamW(frozen=("embedding/*", "*attention/*"), layer_decay=0.5, rates=(("*mlp/up*", 0.0),))
    frozen = replace(experiment, optimizer=optimizer, train=replace(experiment.train, ema=0.5))
    before, state, _ = stepped(frozen, batch, base, steps=1)
    after = jax.device_get(state)
    held = {name for name, leaf in flat(before.params).items() if np.array_equal(leaf, flat(after.params)[name])}
    assert held == {n for n in names(base) if n.startswith("embedding/") or "attention/" in n or "mlp/up" in n}
    assert not [n for n in flat(after.optimizer) if "embedding" in n or "attention/query" in n]
    assert set(names(after.ema)) == {n for n in names(base) if frozen.trains(n)}
    # Adam's first step is the rate's sign: half as much one layer further down (Clark et al. 2020).
    moved = before.params["stack"]["segment_0"]["block_0"]["mlp"]["gate"]["kernel"]
    moved = np.abs(after.params["stack"]["segment_0"]["block_0"]["mlp"]["gate"]["kernel"] - moved)
    decayed = 0.1 * 0.02
    np.testing.assert_allclose(np.median(moved, (1, 2)), [0.0025, 0.005], rtol=0.1 + decayed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": AdamW(frozen=("embeding/*",))},
            r"optimizer.frozen has the pattern 'embeding/\*'.*embedding/table",
        ),
        ({"optimizer": AdamW(rates=(("*mpl*", 0.1),))}, "optimizer.rates has the pattern"),
        ({"optimizer": AdamW(frozen=("*",))}, "freezes every parameter"),
        ({"optimizer": AdamW(layer_decay=0.0)}, "layer_decay is 0.0"),
        ({"adapter": Lora(targets=("*q_proj*",))}, "adapter.targets has the pattern"),
        ({"adapter": Lora(rank=0)}, "adapter.rank is 0"),
        ({"adapter": Lora(table_rank=-1)}, "adapter.table_rank is -1"),
        ({"adapter": Lora(), "init_from": ""}, "init_from names none"),
        ({"adapter": Dora(also=("tasks/*",))}, "adapter.also has the pattern"),
    ],
)
def test_what_does_not_fit_is_refused(experiment, changes, message):
    with pytest.raises(UserError, match=message):
        replace(experiment, **changes).check()


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """A base, and a run of an adapter beside it."""
    root = tmp_path_factory.mktemp("adapters")
    corpus = root / "corpus"
    corpus.mkdir()
    rng = np.random.default_rng(0)
    for index in range(30):
        (corpus / f"{index:02}.txt").write_text(" ".join(rng.choice(["the", "cat", "sat", "on", "a", "mat"], size=30)))
    base = Experiment(
        model=replace(model, vocab=300),
        data=DataConfig((LocalFiles(files=(str(corpus),)),), TrainedBpe(vocab_size=300), held_out=0.2),
        schedule=Schedule(peak=1e-2, warmup=1),
        train=TrainConfig(steps=2, batch=8, length=16, log_every=1, remat="none"),
        eval=EvalConfig(rows=8),
        checkpoint=CheckpointConfig(every=2, keep=3),
    )
    tuned = replace(
        base,
        adapter=Dora(rank=2, dropout=0.1, base="int8"),
        init_from=str(root / "base"),
        train=replace(base.train, steps=4, ema=0.5),
        sample=SampleConfig(prompts=("the",), tokens=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_report", lambda run: {})
        train(base, root / "base")
        train(tuned, root / "tuned")
        yield tuned, root


TOKENS = np.arange(24).reshape(2, 12)


def test_a_checkpoint_holds_the_adapter_alone_and_loads_with_its_base(runs):
    tuned, root = runs
    state = load_subtree(root / "tuned" / "checkpoints", "params").state
    assert {name.rpartition("/")[2] for name in names(state)} == {"a", "b", "magnitude"}
    told = json.loads(RunDir(root / "tuned").base.read_text())
    base = lmx.load(root / "base")
    assert told == {"model": tuned.init_from, "checksum": checksum(base.params)}
    model = lmx.load(root / "tuned")
    assert jax.tree.structure(model.params) == jax.tree.structure(base.params)
    assert np.abs(np.asarray(model.logits(TOKENS) - base.logits(TOKENS))).max() > 1e-3
    convert(root / "tuned", root / "merged", "hf")
    np.testing.assert_allclose(lmx.load(root / "merged").logits(TOKENS), model.logits(TOKENS), atol=1e-5)


def test_a_run_goes_on_exactly(runs, tmp_path):
    tuned, root = runs
    shutil.copytree(root / "tuned", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train(tuned, tmp_path / "again")
    for part in ("params", "optimizer", "ema"):
        one, two = (
            load_subtree(path / "checkpoints", part, step=4).state for path in (root / "tuned", tmp_path / "again")
        )
        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_another_base_is_refused(runs, tmp_path):
    root = runs[1]
    moved = RunDir(tmp_path / "tuned")
    shutil.copytree(root / "tuned", moved.path)
    moved.base.write_text(json.dumps({"model": "other", "checksum": "0" * 16}))
    with pytest.raises(UserError, match="is not the one that this run's adapter was trained beside"):
        lmx.load(moved.path)


def test_checksums_see_every_bit_and_no_mesh(base):
    found = checksum(base)
    sharding = Sharding(build_mesh(MeshConfig(data=1, fsdp=8), jax.devices()), Experiment().rules)
    table = jax.device_put(base["embedding"]["table"], sharding.named(("embed", None)))
    assert checksum({**base, "embedding": {"table": table}}) == found
    assert checksum({**base, "embedding": {"table": table.at[3, 5].add(1e-9)}}) != found
    assert checksum({**base, "embedding": {"table": table[::-1]}}) != found


def test_convert_to_peft_and_back_as_a_start(runs, tmp_path: Path):
    from lmx.adapters.peft import read_peft
    from lmx.decode.sources import read_trained

    tuned, root = runs
    result = convert(root / "tuned", tmp_path / "peft", "peft")
    assert result.compared["updates"] <= 1e-6
    again = read_peft(tuned.model, tuned.adapter, tmp_path / "peft")
    own, _ = read_trained(RunDir(root / "tuned"), tuned)
    for name, leaf in flat(own).items():
        np.testing.assert_allclose(flat(again)[name], leaf, atol=1e-6)
    with pytest.raises(UserError, match="trained no adapter"):
        convert(root / "base", tmp_path / "none", "peft")
    with pytest.raises(UserError, match=r"has the rank 2; set adapter\.rank"):
        read_peft(tuned.model, replace(tuned.adapter, rank=1), tmp_path / "peft")
