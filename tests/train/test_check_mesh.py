"""The check of meshes: it passes on what is right, and fails on what is not."""

import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np
import pytest

from lmx.errors import LmxError, UserError
from lmx.experiment import Experiment, TrainConfig
from lmx.kernels.cross_entropy import LossSums
from lmx.models.families.bert import Bert
from lmx.models.families.gpt2 import Gpt2
from lmx.models.families.llama import Llama
from lmx.models.schedules import PipelineConfig
from lmx.objectives.masked_lm import MaskedLm
from lmx.objectives.next_token import NextToken
from lmx.optim.schedule import Schedule
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding, ways
from lmx.train.check_mesh import MeshCheck, Trial, all_meshes, check_mesh, random_rows
from lmx.train.state import state_shapes
from lmx.train.step import jit_step

EVERYWHERE = MeshConfig(data=2, fsdp=2, tensor=2)


def tiny(model: Any, **changes: Any) -> Experiment:
    train = TrainConfig(batch=8, length=32, accumulate=2, remat="none")
    return Experiment(model=model, train=train, schedule=Schedule(peak=1e-2, warmup=1), **changes)


@pytest.fixture
def gpt2() -> Experiment:
    """With dropout, and biases of keys that have no gradient but rounding."""
    return tiny(Gpt2(vocab=250, context=32, layers=2, width=16, heads=4, dropout=0.1))


@pytest.fixture
def llama() -> Experiment:
    sizes = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 32}
    return tiny(Llama(vocab=250, context=32, **sizes))


def test_a_sound_experiment_is_the_same_on_every_mesh(gpt2: Experiment) -> None:
    names: list[str] = []
    checked = check_mesh(gpt2, [EVERYWHERE], progress=names.append)
    checked.verify()
    assert checked.failure() is None
    assert names == ["one device", "data=2,fsdp=2,tensor=2 (1 of 1)"]
    single, trial = checked.trials
    assert single.failure(checked.tolerance)[0] == 0.0
    assert len(single.loss) == 2
    assert single.sent_bytes_per_device == {}
    assert trial.mesh != single.mesh
    assert 0 < trial.gradient_difference < checked.tolerance
    assert 0 < trial.memory_bytes_per_device < single.memory_bytes_per_device
    assert {"data", "fsdp", "tensor"} <= set(trial.sent_bytes_per_device)
    data = json.loads(json.dumps(checked.data()))
    assert data["same"]
    assert len(data["trials"]) == 2


def test_a_mesh_that_does_not_divide_is_skipped_with_its_reason(llama: Experiment) -> None:
    checked = check_mesh(llama, [MeshConfig(data=2, tensor=4)], steps=1)
    assert "'kv_heads'" in str(checked.trials[1].skipped)
    with pytest.raises(LmxError, match=r"no mesh could be tried: data=2,tensor=4: .*kv_heads"):
        checked.verify()


def test_a_difference_beyond_rounding_fails(llama: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    right = NextToken.loss

    def wrong(self: NextToken, *args: Any, **options: Any) -> LossSums:
        sums = right(self, *args, **options)
        return dataclasses.replace(sums, total=sums.total * (1 + 1e-3 * (ways("act_batch") - 1)))

    monkeypatch.setattr(NextToken, "loss", wrong)
    checked = check_mesh(llama, [MeshConfig(data=4)], steps=1)
    with pytest.raises(LmxError, match=r"on the mesh data=4 differs from one device's by 3\.0e-03"):
        checked.verify()


def test_not_a_number_is_the_worst_difference() -> None:
    trial = Trial({"data": 2, "fsdp": 1, "tensor": 1}, loss_difference=1.0, gradient_difference=math.nan)
    with pytest.raises(LmxError, match=r"gradient of .* on the mesh data=2 differs from one device's by nan"):
        MeshCheck(8, 1, 1e-5, (trial, trial)).verify()


def test_a_parameter_that_went_elsewhere_fails() -> None:
    trial = Trial({"data": 2, "fsdp": 1}, loss_difference=2e-6, param_difference=0.06)
    with pytest.raises(
        LmxError, match=r"a parameter on the mesh data=2 .* by 6\.0e-02 of the learning rate, more than"
    ):
        MeshCheck(8, 1, 1e-5, (trial, trial)).verify()
    MeshCheck(8, 1, 1e-5, (trial, dataclasses.replace(trial, param_difference=0.04))).verify()


def test_too_large_a_mesh_and_no_steps_are_the_users_mistake(llama: Experiment) -> None:
    with pytest.raises(UserError, match="takes 16 devices, but there are 8"):
        check_mesh(llama, [MeshConfig(data=16)])
    with pytest.raises(UserError, match="--steps is 0"):
        check_mesh(llama, steps=0)


def test_all_meshes_are_each_factorisation_once() -> None:
    found = all_meshes(8)
    assert len(set(found)) == len(found) == 56
    assert all(m.data * m.fsdp * m.stage * m.expert * m.sequence * m.tensor == 8 for m in found)


def test_random_rows_are_packed_as_real_ones_are(llama: Experiment) -> None:
    rows, again = random_rows(llama, 3), random_rows(llama, 3)
    assert all(np.array_equal(rows[key], again[key]) for key in rows)
    segments = rows["segment_ids"]
    assert segments.shape == (8, 32)
    assert segments.max() > 1
    targets = (segments > 0).sum(1)
    assert len(set(targets.tolist())) > 1
    assert targets.min() >= 16
    assert max(rows["tokens"].max(), rows["targets"].max()) < 250
    starts = np.diff(segments, axis=1, prepend=0) > 0
    assert (rows["positions"][starts] == 0).all()
    inside = ~starts[:, 1:] & (segments[:, 1:] > 0)
    assert (np.diff(rows["positions"], axis=1)[inside] == 1).all()


def test_an_objective_that_looks_at_whole_rows_is_not_given_parts_of_them() -> None:
    model = Bert(vocab=250, context=32, layers=2, width=16, heads=4, hidden=32, task="token_prediction")
    experiment = tiny(model, objective=MaskedLm(), pipeline=PipelineConfig(schedule="1f1b", microbatches=2))
    step = jit_step(experiment, Sharding(build_mesh(MeshConfig(data=2, stage=2, sequence=2)), Rules()))
    batch = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in random_rows(experiment, 0).items()}
    with pytest.raises(UserError, match=r"looks at whole rows, which pipeline\.schedule 1f1b does not have"):
        step.lower(state_shapes(experiment), batch)
