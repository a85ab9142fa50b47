from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.errors import UserError
from lmx.nn.module import Part
from lmx.nn.router import RouterModule, SigmoidRouter, SoftmaxRouter

LOGITS = np.random.default_rng(0).normal(size=(50, 8)) * 2
CORRECTION = np.random.default_rng(1).normal(size=8) * 0.3


def route(spec, logits=LOGITS, correction=None):
    """A routing's arrays, as NumPy and of one program: every eager operation is compiled."""
    given = None if correction is None else np.float32(correction)
    found = jax.jit(lambda *arrays: vars(spec.choose(*arrays)))(np.float32(logits), given)
    return SimpleNamespace(**jax.device_get(found))


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_softmax(k, renormalise):
    routing = route(SoftmaxRouter(k=k, renormalise=renormalise))
    assert routing.experts.dtype == jnp.int32
    for token, row in enumerate(LOGITS):
        probabilities = np.exp(row) / np.exp(row).sum()
        best = np.argsort(-row)[:k]
        weights = probabilities[best] / (probabilities[best].sum() if renormalise else 1)
        np.testing.assert_array_equal(routing.experts[token], best)
        np.testing.assert_allclose(routing.weights[token], weights, rtol=1e-5)
        np.testing.assert_allclose(routing.probabilities[token], probabilities, rtol=1e-5)


def deepseek(row, correction, spec):
    """One token's experts (as a set) and weights by expert, by the paper's words."""
    scores = 1 / (1 + np.exp(-row))
    corrected = scores + correction
    groups = np.split(np.arange(len(row)), spec.groups)
    best = sorted(groups, key=lambda g: -np.sort(corrected[g])[-2:].sum())[: spec.top_groups]
    experts = sorted(np.concatenate(best), key=lambda e: -corrected[e])[: spec.k]
    total = scores[experts].sum() + 1e-20 if spec.renormalise else 1
    return experts, scores[experts] / total * spec.scale


@pytest.mark.parametrize(
    "spec",
    [
        SigmoidRouter(k=2, groups=4, top_groups=2, scale=2.5),
        SigmoidRouter(k=4, groups=2, top_groups=1),
        SigmoidRouter(k=3, renormalise=False, scale=1.5),
        SigmoidRouter(k=8, groups=8, top_groups=8),
        SigmoidRouter(k=1, groups=4, top_groups=1),
    ],
)
def test_sigmoid(spec):
    routing = route(spec, correction=CORRECTION)
    for token, row in enumerate(LOGITS):
        experts, weights = deepseek(row, CORRECTION, spec)
        np.testing.assert_array_equal(routing.experts[token], experts)
        np.testing.assert_allclose(routing.weights[token], weights, rtol=1e-5)
    np.testing.assert_allclose(routing.probabilities.sum(-1), 1, rtol=1e-5)


def test_the_correction_changes_the_choice_but_not_the_weight_of_the_chosen():
    spec = SigmoidRouter(k=1, renormalise=False)
    plain, pushed = route(spec, correction=np.zeros(8)), route(spec, correction=np.eye(8)[5] * 2)
    assert np.all(pushed.experts == 5)
    assert not np.all(plain.experts == 5)
    np.testing.assert_allclose(pushed.weights[:, 0], jax.nn.sigmoid(LOGITS[:, 5]), rtol=1e-5)


@pytest.mark.parametrize("spec", [SoftmaxRouter(k=3), SigmoidRouter(k=3, groups=2, top_groups=2)])
def test_ties_go_to_the_lower_number(spec):
    np.testing.assert_array_equal(route(spec, np.zeros((2, 8)), np.zeros(8)).experts, [[0, 1, 2]] * 2)


@pytest.mark.parametrize(
    ("spec", "experts", "message"),
    [
        (SoftmaxRouter(k=9), 8, "k=9 cannot choose among 8 experts"),
        (SoftmaxRouter(k=0), 8, "k=0"),
        (SigmoidRouter(k=2, groups=3, top_groups=1), 8, "8 experts do not make 3 equal groups"),
        (SigmoidRouter(k=3, groups=4, top_groups=1), 8, "reaches 2 of 8 experts"),
        (SigmoidRouter(k=3, groups=4, top_groups=5), 8, "at most 4 groups"),
    ],
)
def test_impossible_routers(spec, experts, message):
    with pytest.raises(UserError, match=message):
        spec.check(experts)


def test_the_correction_moves_towards_the_mean_load_and_has_no_gradient():
    spec = SigmoidRouter(k=2, groups=4, top_groups=2, speed=0.01)
    loads = np.float32([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]])
    moved = jax.jit(spec.moved)(np.zeros((2, 4), np.float32), loads)
    np.testing.assert_allclose(moved, [[-0.01, 0, 0, 0.01], [0, 0, 0, 0]], atol=1e-8)
    part = Part(lambda declared: RouterModule(spec, 16, 8, 0.5, declared))
    params = part.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    gradient = jax.jit(jax.grad(lambda p: jnp.square(part.bind(p)(x).weights[..., 0]).sum()))(params)
    gradient = jax.device_get(gradient)
    assert np.all(gradient["correction"] == 0)
    assert np.abs(gradient["kernel"]).max() > 1e-3
    assert part.axes() == {"kernel": ("embed", None), "correction": (None,)}


def test_a_bfloat16_model_routes_in_float32():
    part = Part(lambda declared: RouterModule(SoftmaxRouter(k=2, bias=True), 16, 8, 0.5, declared))
    params = jax.tree.map(lambda a: (a + 0.5).astype(jnp.bfloat16), part.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (3, 16)).astype(jnp.bfloat16)
    routing = part.bind(params)(x)
    assert routing.logits.dtype == routing.weights.dtype == jnp.float32
    wide = {name: np.asarray(a, np.float64) for name, a in params.items()}
    np.testing.assert_allclose(routing.logits, np.asarray(x, np.float64) @ wide["kernel"] + wide["bias"], rtol=1e-5)
