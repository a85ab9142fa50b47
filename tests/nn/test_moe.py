import functools
import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.errors import UserError
from lmx.nn.activation import ClampedGlu
from lmx.nn.context import Context
from lmx.nn.dispatch import Capacity, Dropless
from lmx.nn.moe import Moe
from lmx.nn.router import SigmoidRouter, SoftmaxRouter
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding, use_sharding

WIDTH, EXPERTS, HIDDEN = 8, 6, 12
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 2]], np.int32)
BASE = Moe(experts=EXPERTS, hidden=HIDDEN, std=0.6, out_std=0.6)
SPECS = {
    "mixtral": BASE,
    "one": replace(BASE, router=SoftmaxRouter(k=1, renormalise=False)),
    "all": replace(BASE, router=SoftmaxRouter(k=EXPERTS, renormalise=False)),
    "gpt_oss": replace(BASE, router=SoftmaxRouter(k=3, bias=True), bias=True, gating=ClampedGlu(limit=1.0)),
    "deepseek": replace(
        BASE, router=SigmoidRouter(k=2, groups=3, top_groups=2, scale=2.5), shared=10, balance_loss=0.1, z_loss=0.01
    ),
}
DISPATCHES = {"dropless": Dropless(), "roomy": Capacity(float(EXPERTS)), "tight": Capacity(0.7)}


class Told(NamedTuple):
    hidden: jax.Array
    aux: dict[str, jax.Array]


def context(segments=SEGMENTS):
    return Context(jnp.zeros(segments.shape, jnp.int32), jnp.asarray(segments))


def made(spec, seed=0, segments=SEGMENTS):
    """Parameters with nonzero biases and correction, and hidden states."""
    rng = np.random.default_rng(seed)
    params = spec.inner(WIDTH).init(jax.random.key(seed))  # not as one program: all have kernels of the same shapes
    params = jax.tree.map(lambda a: np.asarray(np.asarray(a) + 0.1 * rng.normal(size=a.shape), np.float32), params)
    return params, rng.normal(size=(*segments.shape, WIDTH)).astype(np.float32)


def run(spec, params, x, segments=SEGMENTS):
    return Told(**_run(spec, params, x, jnp.asarray(segments)))


@functools.partial(jax.jit, static_argnums=0)
def _run(spec, params, x, segments):
    out = spec.inner(WIDTH).bind(params)(x, context(segments))
    return {"hidden": out.hidden, "aux": out.aux}


def gated(spec, x, gate, up, down, biases=(0, 0, 0)):
    gate, up = x @ gate + biases[0], x @ up + biases[1]
    if isinstance(spec.gating, ClampedGlu):
        gate, up = np.minimum(gate, spec.gating.limit), np.clip(up, -spec.gating.limit, spec.gating.limit) + 1
        gate = gate / (1 + np.exp(-spec.gating.alpha * gate))
    else:
        gate = gate / (1 + np.exp(-gate))
    return gate * up @ down + biases[2]


def places(spec, length):
    """Choices that an expert takes of a sequence."""
    if isinstance(spec.dispatch, Dropless):
        return math.inf
    return math.ceil(spec.dispatch.factor * length * spec.router.k / spec.experts)


def slowly(spec, params, x, segments):
    """Token by token and expert by expert in float64, the routing itself taken from the router: output and aux."""
    part = spec.inner(WIDTH).bind(params).router
    routing = jax.tree.map(np.asarray, jax.jit(lambda x: vars(part(x)))(x))
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    out, load, dropped, k = np.zeros(x.shape), np.zeros(spec.experts), 0, spec.router.k
    for b, row in enumerate(segments):
        taken = np.zeros(spec.experts, int)
        for t, segment in enumerate(row):
            for choice in range(k if segment else 0):
                expert = routing["experts"][b, t, choice]
                load[expert] += 1
                taken[expert] += 1
                if taken[expert] > places(spec, len(row)):
                    dropped += 1
                    continue
                maps = [p["experts"][name] for name in ("gate", "up", "down")]
                biases = [m["bias"][expert] if spec.bias else 0 for m in maps]
                y = gated(spec, x[b, t], *(m["kernel"][expert] for m in maps), biases)
                out[b, t] += routing["weights"][b, t, choice] * y
    if spec.shared:
        out += gated(spec, x, *(p["shared"][name]["kernel"] for name in ("gate", "up", "down")))
    choices = max(load.sum(), 1)
    real = segments > 0
    probabilities, logits = (routing[name].astype(np.float64)[real] for name in ("probabilities", "logits"))
    balance = spec.experts * (load / max(real.sum(), 1) * probabilities.mean(0)).sum()
    z = np.square(np.log(np.exp(logits).sum(-1))).mean()
    return out, {
        "loss": spec.balance_loss * balance + spec.z_loss * z,
        "load": load / choices,
        "dropped": dropped / choices,
    }


@pytest.mark.parametrize("dispatch", DISPATCHES.values(), ids=DISPATCHES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_against_a_loop_over_tokens_and_experts(spec, dispatch):
    spec = replace(spec, dispatch=dispatch)
    params, x = made(spec)
    out = run(spec, params, x)
    expected, aux = slowly(spec, params, x, SEGMENTS)
    np.testing.assert_allclose(out.hidden, expected, atol=2e-5, rtol=2e-5)
    assert set(out.aux) == set(aux)
    for name, value in aux.items():
        assert out.aux[name].dtype == jnp.float32
        np.testing.assert_allclose(out.aux[name], value, atol=1e-6, rtol=1e-5, err_msg=name)
    tight = dispatch is DISPATCHES["tight"]
    assert (aux["dropped"] > 0) == tight


def dense(spec, params, x, segments):
    """All experts on all tokens, weighted by the routing: what the gradient is of, without any dispatch."""
    module = spec.inner(WIDTH).bind(params)
    routing, p = module.router(x), params["experts"]
    weights = (jax.nn.one_hot(routing.experts, spec.experts) * routing.weights[..., None]).sum(-2)
    weights = jnp.where(segments[..., None] > 0, weights, 0)

    def linear(name, x, form):
        y = jnp.einsum(form, x, p[name]["kernel"])
        return y + p[name]["bias"] if spec.bias else y

    hidden = spec.gating(linear("gate", x, "bld,edf->blef"), linear("up", x, "bld,edf->blef"))
    out = jnp.einsum("bled,ble->bld", linear("down", hidden, "blef,efd->bled"), weights)
    return out if module.shared is None else out + module.shared(x, context()).hidden


@pytest.mark.parametrize("dispatch", ["dropless", "roomy"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek"])
def test_gradients_equal_the_dense_formulation(name, dispatch):
    spec = replace(SPECS[name], dispatch=DISPATCHES[dispatch])
    params, x = made(spec)

    def gradient(form):
        return jax.jit(jax.grad(lambda p, x: jnp.sin(form(p, x)).sum(), (0, 1)))(params, x)

    ours = gradient(lambda p, x: run(spec, p, x).hidden)
    theirs = gradient(lambda p, x: dense(spec, p, x, SEGMENTS))
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale = np.abs(b).max()
        assert scale > 1e-3 or "correction" in str(path)
        np.testing.assert_allclose(a, b, atol=1e-5 * max(scale, 1), err_msg=str(path))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_padding_takes_no_part(dispatch):
    spec = replace(SPECS["deepseek"], dispatch=DISPATCHES[dispatch], shared=0)
    params, x = made(spec)
    changed = jnp.where(SEGMENTS[..., None] > 0, x, 1e3)
    before, after = run(spec, params, x), run(spec, params, changed)
    np.testing.assert_array_equal(before.hidden, after.hidden)
    assert np.all(np.asarray(before.hidden)[SEGMENTS == 0] == 0)
    jax.tree.map(np.testing.assert_array_equal, before.aux, after.aux)


def test_nothing_but_padding():
    spec = SPECS["deepseek"]
    params, x = made(spec)
    loss = lambda p: run(spec, p, x, np.zeros_like(SEGMENTS)).aux["loss"]  # noqa: E731
    assert loss(params) == 0
    assert all(np.all(g == 0) for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_capacity_honours_the_first_in_order_of_position():
    spec = replace(BASE, router=SoftmaxRouter(k=1, renormalise=False), dispatch=Capacity(1.0))
    segments = np.array([[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 1]], np.int32)
    params, x = made(spec, segments=segments)
    params["router"]["kernel"] = jnp.zeros((WIDTH, EXPERTS))  # all ties: every token to expert 0, which has 2 places
    out = run(spec, params, x, segments)
    served = np.abs(np.asarray(out.hidden)).max(-1) > 0
    np.testing.assert_array_equal(served, [[1, 1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0]])
    assert float(out.aux["dropped"]) == pytest.approx(6 / 10)
    np.testing.assert_allclose(out.aux["load"], np.eye(EXPERTS)[0])


def test_capacity_depends_neither_on_later_positions_nor_on_other_sequences():
    spec = replace(BASE, dispatch=Capacity(0.6))
    whole = np.ones((3, 12), np.int32)
    params, x = made(spec, segments=whole)
    changed = jnp.asarray(x).at[:, 7:].set(1.0).at[0].set(-1.0)
    before, after = (run(spec, params, a, whole) for a in (x, changed))
    assert float(before.aux["dropped"]) > 0.1
    np.testing.assert_allclose(before.hidden[1:, :7], after.hidden[1:, :7], atol=1e-6)


def test_steps_equal_the_whole_for_dropless():
    spec = SPECS["deepseek"]
    whole = np.ones((2, 9), np.int32)
    params, x = made(spec, segments=whole)
    steps = [run(spec, params, x[:, a:b], whole[:, a:b]).hidden for a, b in ((0, 6), (6, 7), (7, 8), (8, 9))]
    np.testing.assert_allclose(jnp.concatenate(steps, 1), run(spec, params, x, whole).hidden, atol=1e-5, rtol=1e-5)


def test_balanced_routing_has_the_least_balance_loss():
    spec = replace(BASE, router=SoftmaxRouter(k=2), balance_loss=1.0)
    params, x = made(spec)
    params["router"]["kernel"] = jnp.zeros((WIDTH, EXPERTS))
    even = run(spec, params, x).aux["loss"]  # equal probabilities: k, whatever the loads
    assert float(even) == pytest.approx(2)
    params["router"]["kernel"] = jnp.tile(jnp.linspace(-3, 3, EXPERTS), (WIDTH, 1))
    assert float(run(spec, params, jnp.ones_like(x)).aux["loss"]) > 5


def test_the_step_moves_the_correction_and_nothing_else():
    spec = replace(SPECS["deepseek"], router=SigmoidRouter(k=2, speed=0.01))
    params, x = made(spec)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), params)
    load = run(spec, params, x).aux["load"]
    after = spec.stepped(stacked, {"load": jnp.stack([load, jnp.full(EXPERTS, 1 / EXPERTS)])})
    moved = after["router"]["correction"] - stacked["router"]["correction"]
    np.testing.assert_allclose(moved[0], 0.01 * np.sign(1 / EXPERTS - load), atol=1e-6)
    np.testing.assert_allclose(moved[1], 0, atol=1e-6)
    after["router"]["correction"] = stacked["router"]["correction"]
    jax.tree.map(np.testing.assert_array_equal, after, stacked)
    plain = made(BASE)[0]
    assert BASE.stepped(plain, {"load": load}) is plain


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_mesh_changes_nothing(dispatch):
    spec = replace(SPECS["deepseek"], experts=4, router=SigmoidRouter(k=2), dispatch=DISPATCHES[dispatch])
    segments = np.concatenate([SEGMENTS, SEGMENTS[:1]])
    params, x = made(spec, segments=segments)

    def value_and_gradient(sharding):
        def total(p, x):
            with use_sharding(sharding):
                out = spec.inner(WIDTH).bind(p)(x, context(segments))
            return jnp.sin(out.hidden).sum() + out.aux["loss"], (out.hidden, out.aux)

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    alone = value_and_gradient(None)(params, x)
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding = Sharding(mesh, Rules(expert=("data",), act_batch=("data", "fsdp")))
    laid = jax.device_put(params, sharding.tree(spec.inner(WIDTH).axes()))
    x = jax.device_put(x, sharding.named(("act_batch", None, None)))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(value_and_gradient(sharding)(laid, x)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_parameters_and_their_axes():
    spec = replace(SPECS["gpt_oss"], shared=10)
    shapes = jax.tree.map(lambda a: a.shape, jax.eval_shape(spec.inner(WIDTH).init, jax.random.key(0)))
    into = {"kernel": (EXPERTS, WIDTH, HIDDEN), "bias": (EXPERTS, HIDDEN)}
    assert shapes["experts"] == {
        "gate": into,
        "up": into,
        "down": {"kernel": (EXPERTS, HIDDEN, WIDTH), "bias": (EXPERTS, WIDTH)},
    }
    assert shapes["router"] == {"kernel": (WIDTH, EXPERTS), "bias": (EXPERTS,)}
    assert shapes["shared"]["down"] == {"kernel": (10, WIDTH)}
    axes = spec.inner(WIDTH).axes()["experts"]
    assert axes["up"] == {"kernel": ("expert", "embed", "mlp"), "bias": ("expert", "mlp")}
    assert axes["down"] == {"kernel": ("expert", "mlp", "embed"), "bias": ("expert", "norm")}


def test_bfloat16():
    spec = SPECS["gpt_oss"]
    params, x = made(spec)
    low = run(spec, *jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x)))
    assert low.hidden.dtype == jnp.bfloat16
    assert {a.dtype for a in low.aux.values()} == {jnp.dtype("float32")}
    error = np.abs(np.asarray(low.hidden, np.float32) - run(spec, params, x).hidden)
    assert np.median(error) < 0.05


def test_bad_input():
    with pytest.raises(UserError, match="k=7 cannot choose among 6 experts"):
        replace(BASE, router=SoftmaxRouter(k=7))
    with pytest.raises(UserError, match="capacity factor must be above 0, not 0"):
        replace(BASE, dispatch=Capacity(0.0))
