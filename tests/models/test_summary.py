"""The summary of a model against arrays that exist: their bytes, their pieces on a mesh, and the cache."""

import json
import math
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from lmx.errors import UserError
from lmx.models.families.bert import Bert
from lmx.models.families.gemma2 import PRESETS as GEMMA2
from lmx.models.families.gpt2 import Gpt2
from lmx.models.families.llama import PRESETS, Llama
from lmx.models.families.palm import PRESETS as PALM
from lmx.models.families.t5 import T5
from lmx.models.flops import forward_flops_per_token, parameter_count, train_flops_per_token
from lmx.models.model import empty_cache, param_axes
from lmx.models.specs import BlockSpec, ModelSpec, StackSpec
from lmx.models.summary import Summary, summarize, to_data
from lmx.nn.latent_attention import LatentAttention
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding
from tests.jitted import init_params

TINY = Llama(vocab=300, context=64, layers=3, width=16, heads=4, kv_heads=2, head_dim=8, hidden=32)
SPLIT = MeshConfig(data=1, fsdp=4, tensor=2)


def abstract(**split: int) -> Sharding:
    sizes = {**asdict(MeshConfig(data=1)), **split}
    kinds = (AxisType.Auto,) * len(sizes)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
    return Sharding(mesh, Rules())  # type: ignore[arg-type]


def cache_sizes(spec: ModelSpec, slots: int, memory: int) -> int:
    return sum(a.size for a in jax.tree.leaves(empty_cache(spec, 1, slots, jnp.int8, memory).layers))


def test_totals_are_those_of_the_counting_functions() -> None:
    summary, spec = summarize(TINY.spec(), 32), TINY.spec()
    assert summary.count == summary.active == parameter_count(spec)
    assert summary.weight_flops + summary.score_flops == forward_flops_per_token(spec, 32)
    assert summary.train_flops == train_flops_per_token(spec, 32)


def test_bytes_are_those_of_the_arrays() -> None:
    params = init_params(TINY.spec(), jax.random.key(0))
    whole = sum(a.nbytes for a in jax.tree.leaves(params))
    assert summarize(TINY.spec(), 8).bytes == whole
    assert summarize(TINY.spec(), 8, dtype="bfloat16").bytes == whole // 2


def test_a_devices_bytes_are_those_that_it_holds() -> None:
    """The mesh by its shape alone, against arrays on a mesh of devices."""
    spec = replace(TINY, vocab=256).spec()
    shardings = Sharding(build_mesh(SPLIT), Rules()).tree(param_axes(spec))
    params = jax.device_put(init_params(spec, jax.random.key(0)), shardings)
    held = [a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(params)]
    summary = summarize(spec, 8, sharding=abstract(**SPLIT.sizes(8)))
    assert [p.device_bytes for p in summary.parameters] == held
    assert summary.device_bytes < summary.bytes


def test_a_mesh_needs_no_devices() -> None:
    summary = summarize(PRESETS["llama_3_70b"].spec(), 8192, sharding=abstract(data=64, fsdp=32, tensor=8))
    query = next(p for p in summary.parameters if p.weight.path[-2:] == ("query", "kernel"))
    assert query.split == ((), ("fsdp",), ("tensor",), ())
    assert query.device_bytes == 80 * 8192 * 64 * 128 * 4 // 256


def test_a_mesh_that_does_not_divide_is_named() -> None:
    with pytest.raises(UserError, match=r"'kv_heads'.*into 4.*does not divide its size 2"):
        summarize(TINY.spec(), 8, sharding=abstract(data=1, fsdp=1, tensor=4))


@pytest.mark.parametrize(
    "spec",
    [
        TINY.spec(),
        replace(PALM["palm_8b"], layers=2).spec(),
        T5(width=16, heads=2, head_dim=8, hidden=32, vocab=128).spec(),
        replace(TINY.spec(), stack=StackSpec.of([BlockSpec((LatentAttention(kv_lora=24, rope_dim=8),))] * 2)),
    ],
)
def test_kept_bytes_are_what_the_cache_grows_by(spec: ModelSpec) -> None:
    summary, base = summarize(spec, 16, cache="int8"), cache_sizes(spec, 8, 8)
    assert summary.cache_bytes() == cache_sizes(spec, 9, 8) - base
    assert summary.cache_bytes(memory=True) == cache_sizes(spec, 8, 9) - base


def test_windows_bound_what_is_kept() -> None:
    summary = summarize(GEMMA2["gemma2_2b"].spec(), 8192)
    each = 13 * 2 * 4 * 256 * 2
    assert sorted((k.layers, k.bytes, k.most or 0) for k in summary.kept) == [(13, each, 0), (13, each, 4096)]
    assert summary.cache_row() == each * (8192 + 4096)


def test_an_encoder_keeps_nothing() -> None:
    assert summarize(Bert(layers=2).spec(), 64).kept == ()


def test_layers_of_a_pattern_are_told_apart() -> None:
    summary = summarize(GEMMA2["gemma2_2b"].spec(), 64)
    layers = {p.weight.path[1:3]: p.weight.layers for p in summary.parameters if p.weight.layers is not None}
    assert sorted(layer for found in set(layers.values()) for layer in found) == list(range(26))
    assert layers["segment_0", "block_1"] == range(1, 26, 2)


def test_a_part_sums_up_its_own() -> None:
    summary = summarize(TINY.spec(), 32)
    parts = [summary.below((name,)) for name in ("embedding", "stack", "final_norm", "head")]
    assert sum(part.count for part in parts) == summary.count
    assert sum(part.train_flops for part in parts) == pytest.approx(summary.train_flops)


def test_the_data_is_json_and_says_the_same() -> None:
    summary: Summary = summarize(Gpt2(layers=2).spec(), 128, sharding=abstract(data=2, fsdp=2, tensor=1))
    data = json.loads(json.dumps(to_data(summary)))
    assert data["parameters"] == summary.count == sum(t["parameters"] for t in data["tensors"])
    assert data["bytes"] == sum(t["bytes"] for t in data["tensors"])
    assert data["bytes"] == 4 * sum(math.prod(t["shape"]) for t in data["tensors"])
    flops = sum(row["flops"] for row in data["tensors"] + data["scores"])
    assert data["flops_per_token"]["forward"] == pytest.approx(flops)
    assert all(len(t["shape"]) == len(t["axes"]) == len(t["sharding"]) for t in data["tensors"])
