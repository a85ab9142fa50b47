"""A mixture on a mesh has the outputs, losses, counts and gradients of one device, and moves no more than it must."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels import expert_exchange
from lmx.nn.activation import ClampedGlu
from lmx.nn.context import Context
from lmx.nn.dispatch import Capacity, Dropless
from lmx.nn.moe import Moe
from lmx.nn.router import SigmoidRouter, SoftmaxRouter
from lmx.sharding.collectives import collectives
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding, use_sharding

WIDTH, BATCH, LENGTH = 16, 8, 12
BASE = Moe(experts=8, hidden=12, std=0.6, out_std=0.6)
SPECS = {
    "deepseek": replace(BASE, router=SigmoidRouter(k=3), shared=8, balance_loss=0.1, z_loss=0.01),
    "gpt_oss": replace(BASE, router=SoftmaxRouter(k=2, bias=True), bias=True, gating=ClampedGlu(limit=1.0)),
}
ROUNDS = Dropless(slack=0.4)
MESHES = {
    "expert=2,fsdp=2,tensor=2": MeshConfig(data=1, expert=2, fsdp=2, tensor=2),
    "expert=4,sequence=2": MeshConfig(data=1, expert=4, sequence=2),
}
MORE = MESHES | {
    "expert=8": MeshConfig(data=1, expert=8),
    "data=2,expert=2,stage=2": MeshConfig(data=2, expert=2, stage=2),
    "sequence=2,tensor=4": MeshConfig(data=1, sequence=2, tensor=4),
}


@functools.cache
def made(name: str, batch: int = BATCH) -> Any:
    rng = np.random.default_rng(0)
    params = jax.jit(SPECS[name].inner(WIDTH).init)(jax.random.key(0))
    params = jax.tree.map(lambda a: np.asarray(a + 0.1 * rng.normal(size=a.shape), np.float32), params)
    segments = rng.integers(0, 3, (batch, LENGTH)).astype(np.int32)
    return params, rng.normal(size=(batch, LENGTH, WIDTH)).astype(np.float32), segments


def step(spec: Moe, sharding: Sharding | None) -> Any:
    """(parameters, x, segments) -> the gradients of a scalar of everything, and everything."""

    def total(params: Any, x: jax.Array, segments: jax.Array) -> Any:
        with use_sharding(sharding):
            out = spec.inner(WIDTH).bind(params)(x, Context(jnp.zeros_like(segments), segments))
        return jnp.sin(out.hidden).sum() + out.aux["loss"], (out.hidden, out.aux)

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))


@functools.cache
def alone(spec: Moe, name: str, batch: int = BATCH) -> Any:
    return jax.device_get(step(spec, None)(*made(name, batch)))


def laid(spec: Moe, name: str, sharding: Sharding, batch: int = BATCH) -> Any:
    params, x, segments = made(name, batch)
    fits = batch % sharding.ways("act_batch") == 0
    rows = sharding.named(("act_batch", "act_length")) if fits else sharding.replicated()
    return jax.device_put(params, sharding.tree(spec.inner(WIDTH).axes())), *jax.device_put((x, segments), rows)


def same(a: Any, b: Any) -> None:
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(float(np.linalg.norm(theirs)), 1e-3)
        assert float(np.linalg.norm(ours - theirs)) <= 1e-5 * scale, jax.tree_util.keystr(path)


def check(name: str, dispatch: Any, config: MeshConfig, rules: Rules = Rules(), batch: int = BATCH) -> None:  # noqa: B008
    spec = replace(SPECS[name], dispatch=dispatch)
    count = int(np.prod(list(vars(config).values())))
    sharding = Sharding(build_mesh(config, jax.devices()[:count]), rules)
    same(jax.device_get(step(spec, sharding)(*laid(spec, name, sharding, batch))), alone(spec, name, batch))


@pytest.fixture(autouse=True)
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_exchange, "ROOM", 1)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_every_mesh_is_one_device(mesh: MeshConfig) -> None:
    check("deepseek", ROUNDS, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MORE.values(), ids=MORE)
@pytest.mark.parametrize("dispatch", [ROUNDS, Dropless(), Capacity(1.0)], ids=["rounds", "one round", "capacity"])
def test_every_mesh_is_one_device_in_other_ways(dispatch: Any, mesh: MeshConfig) -> None:
    check("gpt_oss", dispatch, mesh)


def test_biases_are_added_once() -> None:
    check("gpt_oss", Dropless(), MeshConfig(data=1, tensor=2))


def test_capacity_counts_what_it_drops_as_one_device_does() -> None:
    check("deepseek", Capacity(0.7), MeshConfig(data=1, expert=2, sequence=2))
    assert alone(replace(SPECS["deepseek"], dispatch=Capacity(0.7)), "deepseek")[1][1]["dropped"] > 0.05


def test_a_batch_that_does_not_divide_goes_to_all_experts() -> None:
    check("gpt_oss", Dropless(), MeshConfig(data=1, expert=2), batch=1)


def test_hidden_units_that_are_cut_along_an_axis_of_the_tokens_are_gathered() -> None:
    rules = Rules(mlp=("data", "tensor"), expert=("data",), act_batch=("data", "fsdp"), act_expert_batch=("fsdp",))
    check("deepseek", ROUNDS, MeshConfig(data=2, tensor=2), replace(rules, expert=()))


LOGITS = 3 / 4 * 4 * BATCH * LENGTH * BASE.experts
"""Bytes that one of four devices sends for all to have the router's logits: XLA:CPU does not partition top_k."""


def moved(dispatch: Any, config: MeshConfig) -> set[tuple[str, tuple[str, ...]]]:
    """Kinds and axes of the collectives; of gathers those of more than logits."""
    spec = replace(SPECS["deepseek"], dispatch=dispatch)
    sharding = Sharding(build_mesh(config, jax.devices()[:4]), Rules())
    text = step(spec, sharding).lower(*laid(spec, "deepseek", sharding)).compile().as_text()
    found = collectives(text, sharding.mesh.shape)
    return {(c.kind, c.axes) for c in found if c.kind != "all-gather" or c.sent > LOGITS}


@pytest.mark.parametrize("dispatch", [ROUNDS, Capacity(1.0)], ids=["dropless", "capacity"])
def test_tokens_are_exchanged_and_not_gathered(dispatch: Any) -> None:
    kinds = moved(dispatch, MeshConfig(data=1, expert=4))
    assert kinds == {("all-to-all", ("expert",)), ("all-reduce", ("expert",))}


def test_without_spread_experts_nothing_but_gradients_moves() -> None:
    assert {kind for kind, _ in moved(Dropless(), MeshConfig(data=4))} == {"all-reduce"}
