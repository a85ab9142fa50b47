"""Pipelines: on every mesh with stages, by every schedule, the numbers of one device."""

import functools
import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from lmx.errors import UserError
from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.deepseek_v3 import DeepseekV3
from lmx.models.families.gemma2 import Gemma2
from lmx.models.families.gpt2 import Gpt2
from lmx.models.families.llama import Llama
from lmx.models.families.mixtral import Mixtral
from lmx.models.families.t5 import T5
from lmx.models.model import Inputs
from lmx.models.schedules import PipelineConfig
from lmx.nn.position import Rope
from lmx.nn.router import SigmoidRouter
from lmx.objectives.next_token import NextToken
from lmx.objectives.objective import Batch, Reading
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Sharding
from lmx.train.state import init_state, state_shapes, state_shardings
from lmx.train.step import BATCH, jit_step

SIZES: dict[str, Any] = {
    "vocab": 101,
    "context": 16,
    "width": 16,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 4,
    "hidden": 32,
}
LLAMA = Llama(layers=4, **SIZES)
MODELS: dict[str, Any] = {
    "llama": LLAMA,
    "gemma2": Gemma2(layers=8, window=5, **SIZES),
    "mixtral": Mixtral(layers=4, experts=4, balance_loss=0.02, z_loss=1e-3, **SIZES),
    "t5": T5(vocab=101, context=16, encoder_layers=4, decoder_layers=4, width=16, heads=4, head_dim=4, hidden=32),
}
MORE: dict[str, Any] = {
    "gpt2": Gpt2(vocab=101, context=16, layers=4, width=16, heads=4, dropout=0.2),
    "deepseek": DeepseekV3(
        vocab=101,
        context=16,
        layers=3,
        dense_layers=1,
        width=16,
        heads=4,
        hidden=32,
        q_lora=8,
        kv_lora=8,
        nope_dim=4,
        rope_dim=4,
        value_dim=4,
        rope=Rope(),
        experts=4,
        expert_hidden=8,
        router=SigmoidRouter(k=2),
        balance_loss=0.01,
    ),
}
ONE = MeshConfig(data=1)


@dataclass(frozen=True)
class Copy(NextToken):
    """An encoder-decoder reads the tokens, and predicts each from those before it."""

    def reading(self, spec: Any, batch: Batch) -> Reading:
        inputs = Inputs(batch["tokens"], batch["positions"], batch["segment_ids"])
        return Reading(inputs, inputs)


@dataclass(frozen=True)
class Prefixed(NextToken):
    """A row's first document sees all of itself."""

    def reading(self, spec: Any, batch: Batch) -> Reading:
        segments = batch["segment_ids"]
        return Reading(Inputs(batch["tokens"], batch["positions"], segments, prefix=segments == 1))


def experiment(name: str, **train: Any) -> Experiment:
    return Experiment(
        model=(MODELS | MORE)[name],
        objective=Copy() if name == "t5" else NextToken(z_loss=1e-3),
        optimizer=AdamW(eps=1e-5),  # well above the rounding of a gradient, which Adam would blow up to a whole step
        schedule=Schedule(peak=1e-3, warmup=1, shape="constant"),
        train=TrainConfig(**{"steps": 10, "batch": 16, "length": 16, "remat": "none", **train}),
    )


def rows(seed: int) -> Batch:
    """Two documents and padding a row; the rows hold between 2 and 16 targets."""
    tokens = np.random.default_rng(seed).integers(0, 101, (16, 17)).astype(np.int32)
    columns, ends = np.arange(16, dtype=np.int32)[None], np.linspace(2, 16, 16).astype(np.int32)[:, None]
    segments = np.where(columns < ends // 2, 1, np.where(columns < ends, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, columns - ends // 2, columns * segments)
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments, "positions": positions}
    return jax.tree.map(jnp.asarray, arrays)


@functools.cache
def start(base: Experiment) -> Any:
    return jax.device_get(jax.jit(functools.partial(init_state, base))(jax.random.key(0)))


@functools.cache
def run(base: Experiment, mesh: MeshConfig = ONE, across: bool = False) -> Any:
    """The metrics of two steps, and the parameters after them; ``across``: the stages lie as if across slices."""
    count = int(np.prod(list(vars(mesh).values())))
    built = build_mesh(mesh, jax.devices()[:count])
    if across:
        order = sorted(range(len(built.axis_names)), key=lambda axis: built.axis_names[axis] != "stage")
        names = tuple(built.axis_names[axis] for axis in order)
        built = Mesh(built.devices.transpose(order), names, axis_types=built.axis_types)
    sharding = Sharding(built, base.rules)
    shardings = state_shardings(base, sharding)
    plain = replace(base, pipeline=PipelineConfig(), train=replace(base.train, accumulate=1))
    state = jax.device_put(start(plain), shardings)
    metrics, step = [], jit_step(base, sharding)
    for i in range(2):
        state, new = step(state, jax.device_put(rows(i), sharding.named(BATCH)))
        metrics.append(jax.device_get(new))
    return metrics, jax.device_get(state.params)


def same(a: Any, b: Any) -> None:
    for ours, one in zip(a[0], b[0], strict=True):
        for name in ("loss", "nll", "grad_norm", "targets", "accuracy"):
            assert ours[name] == pytest.approx(one[name], rel=1e-5), name
        for name in {"router_loss", "dropped"} & set(one):
            assert ours[name] == pytest.approx(one[name], rel=1e-5), name
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=0), a[1], b[1])


def pipelined(base: Experiment, schedule: Any, microbatches: int = 4, **more: Any) -> Experiment:
    return replace(base, pipeline=PipelineConfig(schedule, microbatches, **more))


SCHEDULES = ["gpipe", "circular", "1f1b"]


FAST = [("llama", "circular"), ("llama", "1f1b"), ("mixtral", "1f1b"), ("t5", "gpipe")]  # more in test_check_mesh_pairs
PAIRS = [
    pytest.param(name, schedule, marks=() if (name, schedule) in FAST else pytest.mark.slow)
    for name in MODELS
    for schedule in SCHEDULES
]


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_stages_give_the_numbers_of_one_device(name: str, schedule: str) -> None:
    """A router's balance is a product of means, and goes by microbatch, as with gradient accumulation."""
    base = experiment(name)
    one = experiment(name, accumulate=4) if name == "mixtral" else base
    same(run(pipelined(base, schedule), MeshConfig(data=2, stage=2, tensor=2)), run(one))


GPIPE_OR_1F1B = [pytest.param("gpipe", marks=pytest.mark.slow), "1f1b"]


@pytest.mark.parametrize("schedule", GPIPE_OR_1F1B)
def test_prefixes_go_through_the_stages(schedule: str) -> None:
    base = replace(experiment("llama"), objective=Prefixed())
    ours = run(pipelined(base, schedule), MeshConfig(data=2, stage=2, tensor=2))
    same(ours, run(base))
    assert ours[0][0]["loss"] != pytest.approx(run(experiment("llama"))[0][0]["loss"], rel=1e-4)  # which is causal


MESHES = [
    pytest.param(MeshConfig(data=1, fsdp=2, stage=4), "gpipe", 4, marks=pytest.mark.slow),
    pytest.param(MeshConfig(data=1, stage=4, tensor=2), "1f1b", 8, marks=pytest.mark.slow),
    pytest.param(MeshConfig(data=1, stage=2, sequence=2, tensor=2), "circular", 4, marks=pytest.mark.slow),
    (MeshConfig(data=2, stage=2, sequence=2), "1f1b", 2),
    pytest.param(MeshConfig(slice=2, data=1, stage=2), "gpipe", 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("mesh", "schedule", "microbatches"), MESHES, ids=str)
def test_stages_go_with_other_axes_and_accumulation(mesh: MeshConfig, schedule: str, microbatches: int) -> None:
    accumulate = 1 if microbatches == 8 else 2
    same(
        run(pipelined(experiment("llama", accumulate=accumulate), schedule, microbatches), mesh),
        run(experiment("llama")),
    )


def test_stages_may_be_the_outermost_axis() -> None:
    mesh = MeshConfig(data=1, fsdp=2, stage=2, tensor=2)
    same(run(pipelined(experiment("llama"), "gpipe"), mesh, across=True), run(experiment("llama")))


@pytest.mark.slow  # by gpipe: test_check_mesh_pairs
def test_experts_and_stages() -> None:
    mesh = MeshConfig(data=1, expert=2, stage=2, tensor=2)
    same(run(pipelined(experiment("mixtral"), "circular"), mesh), run(experiment("mixtral", accumulate=4)))


@pytest.mark.parametrize("schedule", GPIPE_OR_1F1B)
def test_layers_before_the_longest_segment_run_on_all_stages(schedule: str) -> None:
    base = experiment("deepseek")
    one = experiment("deepseek", accumulate=4)
    same(run(pipelined(base, schedule), MeshConfig(data=2, stage=2)), run(one))


def test_dropout_depends_neither_on_the_stages_nor_on_the_schedule() -> None:
    two, four = MeshConfig(data=1, stage=2, tensor=2), MeshConfig(data=2, stage=4)
    base = experiment("gpt2")
    found, alone = run(pipelined(base, "gpipe"), two), run(base)
    same(run(pipelined(base, "1f1b"), four), found)
    same(run(pipelined(base, "gpipe", 1), two), alone)
    assert found[0][0]["loss"] != alone[0][0]["loss"]


def compiled(schedule: str, microbatches: int) -> Any:
    base = pipelined(experiment("llama", batch=4 * microbatches), schedule, microbatches)
    sharding = Sharding(build_mesh(MeshConfig(data=2, stage=4)), base.rules)
    state = jax.eval_shape(functools.partial(init_state, base), jax.random.key(0))
    batch = {name: jax.ShapeDtypeStruct((4 * microbatches, 16), jnp.int32) for name in rows(0)}
    return jit_step(base, sharding).lower(state, batch).compile()


def test_1f1b_keeps_a_bounded_number_of_activations() -> None:
    all_forward, few, many = (
        compiled(schedule, microbatches).memory_analysis().temp_size_in_bytes
        for schedule, microbatches in (("gpipe", 16), ("1f1b", 4), ("1f1b", 16))
    )
    assert many < all_forward / 3
    assert many - few < (all_forward - few) / 5


def test_parameters_stay_on_their_stage() -> None:
    """Their shards are a stage's layers, and no collective but the data's all-reduce carries them."""
    base = experiment("llama")
    sharding = Sharding(build_mesh(MeshConfig(data=2, stage=4)), base.rules)
    params = state_shardings(base, sharding).params
    assert {leaf.spec[0] for leaf in jax.tree.leaves(params["stack"])} == {"stage"}
    gathers = [line for line in compiled("gpipe", 4).as_text().splitlines() if " all-gather(" in line]
    assert gathers
    # [microbatches, rows, length], and their hidden states
    rows = re.compile(r"= (s32\[\d+,\d+,16\]|f32\[\d+,\d+,16,16\])")
    shapes = {tuple(leaf.shape[-2:]) for leaf in jax.tree.leaves(state_shapes(base).params["stack"])}
    assert (16, 16) not in shapes
    assert all(rows.search(line) for line in gathers), "only the rows on their way into the pipeline"


def test_what_does_not_fit_says_so() -> None:
    sharding = Sharding(build_mesh(MeshConfig(data=1, stage=8)), experiment("llama").rules)
    with pytest.raises(UserError, match=r"8 stages of 1 chunks do not divide the 4 repeats .* is 8 repeats"):
        state_shardings(experiment("llama"), sharding)
    sharding = Sharding(build_mesh(MeshConfig(data=2, stage=4)), sharding.rules)
    with pytest.raises(UserError, match=r"4 stages of 2 chunks do not divide the 4 repeats .* is 8 repeats"):
        state_shardings(pipelined(experiment("llama"), "circular"), sharding)
    with pytest.raises(UserError, match=r"microbatches 3 does not fit 8 rows a device .* nearest that does is 2"):
        state_shardings(pipelined(experiment("llama"), "gpipe", 3), sharding)


@pytest.mark.parametrize("schedule", GPIPE_OR_1F1B)
def test_bfloat16_stays_close(schedule: str) -> None:
    base = experiment("llama", compute="bfloat16")
    ours, one = run(pipelined(base, schedule), MeshConfig(data=2, stage=2)), run(base)
    assert ours[0][1]["loss"] == pytest.approx(one[0][1]["loss"], rel=1e-4)
    assert ours[0][1]["grad_norm"] == pytest.approx(one[0][1]["grad_norm"], rel=1e-2)
