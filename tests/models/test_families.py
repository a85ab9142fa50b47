"""Every family against what its reference computes (tests/golden/make.py), and against itself."""

import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import OUTPUTS, Golden, load_golden

from lmx.checkpoint.huggingface import export_tensors, import_tensors, read_config
from lmx.config import from_data, to_data
from lmx.kernels.cross_entropy import vocabulary_loss
from lmx.models.config import ModelConfig
from lmx.models.model import (
    Inputs,
    apply,
    aux_sum,
    cast_floats,
    empty_cache,
    encode,
    init_params,
    logits,
    param_axes,
    readout,
    task,
    unstack_layers,
)

DIRECTORY = Path(os.environ.get("LMX_GOLDEN", Path(__file__).parents[1] / "golden"))
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.npz"))
TASKS = ("_sequence", "_token", "_span", "_mean")
WHOLE = [name for name in NAMES if not name.endswith(TASKS)]
"""Models that predict tokens."""
TIGHT = {"atol": 5e-5, "rtol": 5e-5}


@functools.cache
def model(name: str) -> Golden:
    return load_golden(name, DIRECTORY)


def hidden_of(golden: Golden, params: Any) -> tuple[Any, Any, Any]:
    """Hidden states where tokens are predicted, the encoder's memory, and what the sublayers told."""
    return states(golden, params, golden.inputs, golden.predicted)


def states(golden: Golden, params: Any, source: Inputs, read: Inputs) -> tuple[Any, Any, Any]:
    """The same for other inputs; a model of one stack has no source."""
    memory, told = encode(golden.spec, params, source) if golden.spec.encoder else (None, {})
    out = apply(golden.spec, params, read, memory=memory)
    return out.hidden, memory, {**told, **out.aux}


@functools.cache
def ours(name: str) -> dict[str, np.ndarray]:
    """Our outputs, by name."""
    golden = model(name)

    @jax.jit
    def run(params: Any) -> dict[str, jax.Array]:
        hidden, memory, _ = hidden_of(golden, params)
        out = {"states": hidden, "hidden": hidden if memory is None else memory.hidden}
        if golden.spec.head is not None:
            out["logits"] = logits(golden.spec, params, hidden)[..., : golden.spec.vocab]
        for head in golden.spec.tasks:
            key = {"nsp": "nsp", "pooled": "pooled"}.get(head.name, "task")
            out[key] = task(golden.spec, params, head.name, hidden, golden.predicted)
        return out

    return {key: np.asarray(array) for key, array in run(golden.params).items()}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_the_references(name: str) -> None:
    golden = model(name)
    compared = [key for key in OUTPUTS if key in golden.arrays and key in ours(name)]
    assert {"logits", "task"} & set(compared)
    for key in compared:
        expected, got = golden.arrays[key], ours(name)[key]
        inputs = golden.inputs if key == "hidden" else golden.predicted
        real = np.ones(expected.shape[:1], bool) if got.ndim == 2 else np.asarray(inputs.segments) > 0
        np.testing.assert_allclose(got[real], expected[real], atol=1e-4, rtol=0, err_msg=key)
        np.testing.assert_array_equal(got[real].argmax(-1), expected[real].argmax(-1), err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_export_is_what_was_imported(name: str) -> None:
    golden = model(name)
    tensors = export_tensors(golden.config, import_tensors(golden.config, golden.tensors))
    assert set(tensors) <= set(golden.tensors)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, golden.tensors[key], err_msg=key)
    again = import_tensors(golden.config, tensors)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(golden.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_configurations_go_both_ways(name: str) -> None:
    config = model(name).config
    assert read_config(config.to_huggingface()) == config
    assert from_data(ModelConfig, to_data(config)) == config


@pytest.mark.parametrize("name", WHOLE)
def test_unrolled_equals_scanned(name: str) -> None:
    golden = model(name)
    run = jax.jit(lambda params: hidden_of(golden, unstack_layers(golden.spec, params))[0])
    np.testing.assert_allclose(run(golden.params), ours(name)["states"], **TIGHT)


def is_decoder(name: str) -> bool:
    return name.partition("_")[0] not in ("bert", "roberta", "modernbert")


@pytest.mark.parametrize("name", [name for name in WHOLE if is_decoder(name)])
def test_prefill_and_steps_equal_the_full_forward(name: str) -> None:
    golden = model(name)
    params, whole = unstack_layers(golden.spec, golden.params), golden.predicted
    batch, length = whole.tokens.shape
    memory = encode(golden.spec, params, golden.inputs)[0] if golden.spec.encoder else None
    cache = empty_cache(golden.spec, batch, length, jnp.float32, golden.tokens.shape[1] if memory else 0)
    first = jax.jit(lambda inputs, cache: apply(golden.spec, params, inputs, memory=memory, cache=cache))
    step = jax.jit(lambda inputs, cache: apply(golden.spec, params, inputs, cache=cache))
    hidden: list[jax.Array] = []
    for start, end in itertools.pairwise([0, *range(9, length + 1)]):
        out = (step if start else first)(jax.tree.map(lambda a, s=start, e=end: a[:, s:e], whole), cache)
        hidden, cache = [*hidden, out.hidden], out.cache
    real = np.asarray(whole.segments) > 0
    np.testing.assert_allclose(np.concatenate(hidden, axis=1)[real], ours(name)["states"][real], **TIGHT)


def packed(inputs: Inputs, cut: int) -> Inputs:
    """Two rows of two documents, the first row's tokens cut there: one after the other, and the other way around."""
    tokens, length = inputs.tokens[0], inputs.tokens.shape[1]
    sizes = [(cut, length - cut), (length - cut, cut)]
    rows = jnp.stack([tokens, jnp.roll(tokens, -cut)])
    segments = jnp.asarray([[1] * a + [2] * b for a, b in sizes], jnp.int32)
    positions = jnp.asarray([[*range(a), *range(b)] for a, b in sizes], jnp.int32)
    types = None if inputs.types is None else jnp.stack([inputs.types[0], jnp.roll(inputs.types[0], -cut)])
    return Inputs(rows, positions, segments, types)


@pytest.mark.parametrize("name", WHOLE)
def test_packed_documents_are_the_same_in_any_company(name: str) -> None:
    golden, cut = model(name), 9
    source, read = packed(golden.inputs, cut), packed(golden.predicted, cut)
    # In the second row the documents change their numbers too: a decoder's segment is that of the encoder.
    run = jax.jit(lambda params: states(golden, params, source, read)[0])
    first, second = np.asarray(run(golden.params))
    np.testing.assert_allclose(np.roll(second, cut, axis=0), first, **TIGHT)


def token_loss(golden: Golden) -> Callable[[Any], jax.Array]:
    """The mean loss of predicting the next token (an encoder's: the token itself)."""
    inputs = golden.predicted
    tokens, segments = inputs.tokens, inputs.segments
    if is_decoder(golden.name):
        targets = jnp.roll(tokens, -1, axis=1)
        weights = ((segments > 0) & (jnp.roll(segments, -1, axis=1) > 0)).at[:, -1].set(False)
    else:
        targets, weights = tokens, segments > 0

    def loss(params: Any) -> jax.Array:
        hidden, _, told = hidden_of(golden, params)
        sums = vocabulary_loss(readout(golden.spec, params, hidden), targets, weights.astype(jnp.float32))
        others = sum(jnp.square(task(golden.spec, params, h.name, hidden, inputs)).mean() for h in golden.spec.tasks)
        return sums.total / sums.weight, aux_sum(told, "loss") + others

    return loss


@functools.cache
def differentiated(name: str) -> tuple[float, Any, float]:
    """The token loss, the gradients of it and of all else there is, and how a step down changes that sum."""
    golden = model(name)
    loss = token_loss(golden)

    @jax.jit
    def run(params: Any) -> Any:
        (_, parts), gradients = jax.value_and_grad(lambda p: (sum(parts := loss(p)), parts), has_aux=True)(params)
        return parts, gradients

    parts, gradients = jax.device_get(run(golden.params))  # NumPy from here: an eager JAX operation compiles
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradients)))
    after = jax.tree.map(lambda p, g: np.asarray(p) - np.float32(0.02 / norm) * g, golden.params, gradients)
    after = jax.device_put(after, jax.devices()[0])  # as the golden ones are: elsewhere they are another program's
    return float(parts[0]), gradients, float(sum(jax.device_get(run(after)[0])) - sum(parts))


@pytest.mark.parametrize("name", WHOLE)
def test_loss_and_gradients_are_the_references(name: str) -> None:
    golden = model(name)
    assert differentiated(name)[0] == pytest.approx(golden.loss, rel=1e-5)
    if golden.spec.tasks:  # our gradients have those of the other heads in them
        return
    exported = {key: np.array(a) for key, a in export_tensors(golden.config, differentiated(name)[1]).items()}
    padding = golden.config_json.get("pad_token_id")
    for key, expected in golden.gradients.items():
        if len(expected) == golden.config.vocab and padding is not None:
            exported[key][padding] = expected[padding]  # PyTorch gives this row of an embedding no gradient
        scale = max(np.abs(expected).max(), 1e-3)  # a bias on keys has none: softmax does not see it
        np.testing.assert_allclose(exported[key], expected, atol=1e-4 * scale, rtol=1e-3, err_msg=key)


@pytest.mark.parametrize("name", WHOLE)
def test_gradients_are_finite_and_reach_every_parameter(name: str) -> None:
    for path, gradient in jax.tree.leaves_with_path(differentiated(name)[1]):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(gradient).all(), where
        layers = gradient.reshape(gradient.shape[0] if "segment" in where else 1, -1)
        assert np.abs(layers).max(1).min() > 0 or where.endswith("/correction"), where


@pytest.mark.parametrize("name", WHOLE)
def test_a_step_down_lowers_the_loss(name: str) -> None:
    assert differentiated(name)[2] < 0


@pytest.mark.parametrize("name", WHOLE)
def test_fresh_parameters_and_axes_fit(name: str) -> None:
    golden = model(name)
    fresh = jax.eval_shape(lambda: init_params(golden.spec, jax.random.key(0)))
    assert jax.tree.structure(fresh) == jax.tree.structure(golden.params)
    assert [a.shape for a in jax.tree.leaves(fresh)] == [a.shape for a in jax.tree.leaves(golden.params)]
    axes = jax.tree.leaves(param_axes(golden.spec), is_leaf=lambda x: isinstance(x, tuple))
    assert [len(a) for a in axes] == [a.ndim for a in jax.tree.leaves(fresh)]


@pytest.mark.parametrize("name", WHOLE)
def test_bfloat16_stays_bfloat16(name: str) -> None:
    golden = model(name)
    low = jax.eval_shape(lambda p: hidden_of(golden, cast_floats(p, jnp.bfloat16))[0], golden.params)
    assert low.dtype == jnp.bfloat16
