"""The train step of mixtures of experts and of bounded logits: what plain Llamas do not have."""

from dataclasses import replace

import numpy as np
import pytest
from test_step import BASE, LENGTH, assert_close, batch_of, fresh, run

from lmx.models.families.deepseek_v3 import DeepseekV3
from lmx.models.families.gemma2 import Gemma2
from lmx.models.families.mixtral import Mixtral
from lmx.models.model import Inputs, apply, cast_floats, stepped
from lmx.nn.dispatch import Capacity
from lmx.nn.position import Rope
from lmx.nn.router import SigmoidRouter

SIZES = {"vocab": 203, "context": LENGTH, "layers": 2, "width": 32, "heads": 4, "hidden": 48}
DEEPSEEK = DeepseekV3(
    **SIZES | {"layers": 3},
    q_lora=None,
    kv_lora=16,
    nope_dim=8,
    rope_dim=4,
    value_dim=8,
    dense_layers=1,
    experts=8,
    expert_hidden=16,
    router=SigmoidRouter(k=2, groups=4, top_groups=2, speed=0.01),
    rope=Rope(500.0, pairing="interleaved"),
    balance_loss=0.01,
)
MIXTRAL = Mixtral(**SIZES, kv_heads=2, head_dim=8, experts=4, balance_loss=0.02, z_loss=0.001)
GEMMA = Gemma2(**SIZES, kv_heads=2, head_dim=8, window=5)


@pytest.mark.parametrize(
    "model",
    [
        DEEPSEEK,
        replace(MIXTRAL, dispatch=Capacity(1.0)),
        *(pytest.param(m, marks=pytest.mark.slow) for m in (MIXTRAL, GEMMA)),
    ],
    ids=repr,
)
def test_eight_devices_equal_one(model):
    experiment = replace(BASE, model=model)
    (one, first), (many, metrics) = run(experiment), run(experiment, sizes=(2, 2, 2))
    assert_close(metrics, first, rtol=1e-5, atol=1e-6)
    assert_close(many.params, one.params, atol=2e-5, rtol=0)


def correction(params, block="segment_1/block_0"):
    segment, block = block.split("/")
    return np.asarray(params["stack"][segment][block]["moe"]["router"]["correction"])


def test_corrections_move_by_the_rule_and_not_by_the_gradient():
    experiment = replace(BASE, model=DEEPSEEK)
    before, (state, metrics) = fresh(experiment), run(experiment, steps=1)
    moved = correction(state.params) - correction(before.params)
    assert moved.shape == (2, 8)
    np.testing.assert_allclose(np.abs(moved)[moved != 0], 0.01, rtol=1e-5)
    assert (moved > 0).any()
    assert (moved < 0).any()
    assert metrics[0]["router_loss"] > 0
    assert metrics[0]["dropped"] == 0


def test_overloaded_experts_lose_and_idle_ones_gain():
    params = fresh(replace(BASE, model=DEEPSEEK)).params
    load = np.array([[0.5, 0.5, 0, 0, 0, 0, 0, 0], [0.125] * 8], np.float32)
    after = stepped(DEEPSEEK.spec(), params, {"stack": {"segment_1": {"block_0": {"moe": {"load": load}}}}})
    expected = 0.01 * np.array([[-1, -1, 1, 1, 1, 1, 1, 1], [0] * 8])
    np.testing.assert_allclose(correction(after) - correction(params), expected, atol=1e-7)


def test_the_routers_loss_is_in_the_loss():
    metrics = run(replace(BASE, model=MIXTRAL), steps=1)[1][0]
    plain = run(replace(BASE, model=replace(MIXTRAL, balance_loss=0.0, z_loss=0.0)), steps=1)[1][0]
    assert metrics["nll"] == pytest.approx(plain["nll"], rel=1e-5)
    assert metrics["loss"] - metrics["router_loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert plain["router_loss"] == 0
    assert metrics["router_loss"] > 0.02 * 2  # two layers, each at least k = 2 times the coefficient when balanced


def test_capacity_drops_and_says_so():
    tight = run(replace(BASE, model=replace(MIXTRAL, dispatch=Capacity(0.5))), steps=1)[1][0]
    assert 0 < tight["dropped"] < 1


def test_corrections_stay_exact_in_low_precision():
    low = cast_floats(fresh(replace(BASE, model=DEEPSEEK)).params, "bfloat16")
    assert correction(low).dtype == np.float32
    inputs = batch_of(0)
    read = Inputs(inputs["tokens"], inputs["positions"], inputs["segment_ids"])
    assert apply(DEEPSEEK.spec(), low, read).hidden.dtype == "bfloat16"
