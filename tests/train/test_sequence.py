"""Training with rows split over devices: the losses, gradients and parameters of one device."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from lmx.experiment import Experiment, TrainConfig
from lmx.kernels.cross_entropy import LossSums, vocabulary_loss
from lmx.models.families.deepseek_v3 import DeepseekV3
from lmx.models.families.gemma2 import Gemma2
from lmx.models.families.gpt2 import Gpt2
from lmx.models.families.gpt_oss import GptOss
from lmx.models.families.llama import Llama
from lmx.models.families.t5 import T5
from lmx.models.model import Inputs, apply, encode, readout
from lmx.objectives.next_token import NextToken
from lmx.objectives.objective import Batch
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule
from lmx.sharding.layouts import LAYOUTS
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding
from lmx.train.check_mesh import check_mesh, random_rows
from lmx.train.state import state_shapes, state_shardings
from lmx.train.step import BATCH, jit_step

LENGTH = 32
SIZES = {"vocab": 203, "context": LENGTH, "layers": 2, "width": 32, "heads": 8, "hidden": 48}
LLAMA = Llama(**SIZES, kv_heads=4, head_dim=8)
GEMMA = Gemma2(**SIZES, kv_heads=4, head_dim=8, window=7)
GPT_OSS = GptOss(
    **SIZES | {"layers": 1, "hidden": 16}, kv_heads=4, head_dim=8, period=1, experts=4, k=2, balance_loss=0.02
)
LATENT = DeepseekV3(
    **SIZES | {"layers": 1},
    q_lora=None,
    kv_lora=16,
    nope_dim=8,
    rope_dim=4,
    value_dim=6,
    dense_layers=1,
    experts=4,
    expert_hidden=16,
)


@dataclass(frozen=True)
class Repeating(NextToken):
    """An encoder-decoder says the targets of what it reads."""

    def check(self, model: Any, length: int) -> None:
        """Any encoder-decoder fits."""

    def loss(self, spec: Any, params: Any, batch: Batch, *, key: Any = None, remat: Any = "none") -> LossSums:
        """The sums over every position that is not padding."""
        inputs = Inputs(batch["tokens"], batch["positions"], batch["segment_ids"])
        memory, _ = encode(spec, params, inputs, key=key, remat=remat)
        hidden = apply(spec, params, inputs, memory=memory, key=key, remat=remat).hidden
        weights = (batch["segment_ids"] > 0).astype(jnp.float32)
        return vocabulary_loss(readout(spec, params, hidden), batch["targets"], weights)


def experiment(model: Any, kind: Any = "ring", rules: Rules = LAYOUTS["ddp"].rules, **changes: Any) -> Experiment:
    train = TrainConfig(batch=4, length=LENGTH, remat="none")
    rules = replace(rules, sequence_attention=kind)
    optimizer = AdamW(eps=1e-5)
    return Experiment(
        model=model, train=train, rules=rules, optimizer=optimizer, schedule=Schedule(peak=1e-3, warmup=1), **changes
    )


def assert_same(checked: Experiment, *meshes: MeshConfig) -> None:
    result = check_mesh(checked, meshes)
    assert [t.skipped for t in result.trials] == [None] * (len(meshes) + 1)
    result.verify()
    # A device holds its share of the activations and of their gradients.
    assert all(t.memory_bytes_per_device < result.trials[0].memory_bytes_per_device for t in result.trials[1:])


T5_SIZES = {"vocab": 203, "width": 32, "heads": 8, "head_dim": 8, "hidden": 48, "buckets": 8, "max_distance": 20}
SMALL_T5 = T5(**T5_SIZES, encoder_layers=2, decoder_layers=2)
GPT2 = Gpt2(**{k: v for k, v in SIZES.items() if k != "hidden"}, dropout=0.1)
EIGHT = MeshConfig(data=2, sequence=2, tensor=2)


def test_llama_by_a_ring() -> None:
    assert_same(experiment(LLAMA), MeshConfig(data=1, sequence=4))


@pytest.mark.slow
def test_llama_on_other_meshes_of_a_ring() -> None:
    meshes = [MeshConfig(data=1, sequence=2), MeshConfig(data=1, sequence=8), MeshConfig(data=1, fsdp=4, sequence=2)]
    assert_same(experiment(LLAMA), *meshes, EIGHT)


@pytest.mark.slow
def test_rematerialised() -> None:
    base = experiment(LLAMA)
    assert_same(replace(base, train=replace(base.train, remat="dots")), MeshConfig(data=1, sequence=2))


@pytest.mark.parametrize("kind", ["all_gather", "all_to_all"])
def test_llama_by_the_other_kinds(kind: str) -> None:
    assert_same(experiment(LLAMA, kind), EIGHT)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        pytest.param(GEMMA, "ring", marks=pytest.mark.slow),
        (LATENT, "all_gather"),
        pytest.param(GPT_OSS, "ring", marks=pytest.mark.slow),
        pytest.param(GPT2, "all_to_all", marks=pytest.mark.slow),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_families(model: Any, kind: str) -> None:
    """Windows and soft caps; sinks and experts; values of another width; attention without positions, and dropout."""
    assert_same(experiment(model, kind), MeshConfig(data=1, sequence=2))


@pytest.mark.slow  # by a ring: test_check_mesh_pairs
@pytest.mark.parametrize("kind", ["ring", "all_gather", "all_to_all"])
def test_an_encoder_decoder_with_relative_positions(kind: str) -> None:
    assert_same(experiment(SMALL_T5, kind, objective=Repeating()), MeshConfig(data=1, sequence=2))


def test_sequence_sharded_norms() -> None:
    assert_same(experiment(LLAMA, rules=LAYOUTS["megatron"].rules), EIGHT)


def compiled(checked: Experiment, mesh: MeshConfig) -> str:
    """The text of the compiled train step."""
    devices = jax.devices()[: mesh.data * mesh.sequence * mesh.tensor]
    sharding = Sharding(build_mesh(mesh, devices), checked.rules)
    place = lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)  # noqa: E731
    state = jax.tree.map(place, state_shapes(checked), state_shardings(checked, sharding))
    batch = {name: place(rows, sharding.named(BATCH)) for name, rows in random_rows(checked, 0).items()}
    return str(cast(Any, jit_step(checked, sharding)).lower(state, batch).compile().as_text())


def gathered(text: str) -> set[tuple[int, ...]]:
    """The shapes of what is gathered."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather", text)
    return {tuple(int(n) for n in shape.split(",") if n) for shape in shapes}


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, sequence=4), EIGHT], ids=repr)
def test_nothing_but_positions_and_keys_is_gathered(mesh: MeshConfig) -> None:
    """Of 4 rows of 32, the embeddings 40 wide, 4 key heads of 8 dims."""
    batch, kv_heads, width = 4 // mesh.data, 4 // mesh.tensor, 40
    model = replace(LLAMA, width=width)
    ring = gathered(compiled(experiment(model), mesh))
    assert ring == {(batch, LENGTH)}
    everything = gathered(compiled(experiment(model, "all_gather"), mesh))
    keys = {shape for shape in everything if len(shape) > 2}
    assert keys
    assert all(math.prod(shape) == batch * kv_heads * LENGTH * 8 for shape in keys)


def test_a_length_that_does_not_divide_is_skipped_with_its_reason() -> None:
    odd = replace(experiment(LLAMA), train=TrainConfig(batch=4, length=30))
    trial = check_mesh(odd, [MeshConfig(data=1, sequence=4)], steps=1).trials[1]
    assert "does not divide the length 30; the nearest length that it divides is 32" in str(trial.skipped)
