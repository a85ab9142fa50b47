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


def states(golden: Golden, params: Any, source: Inputs, read: Inputs) -> tuple[Any, Any, Any]:
    """Hidden states where tokens are predicted, the encoder's memory, and what the sublayers told; a model of one
    stack has no source."""
    memory, told = encode(golden.spec, params, source) if golden.spec.encoder else (None, {})
    out = apply(golden.spec, params, read, memory=memory)
    return out.hidden, memory, {**told, **out.aux}


def is_decoder(name: str) -> bool:
    return name.partition("_")[0] not in ("bert", "roberta", "modernbert")


def token_loss(golden: Golden, params: Any, hidden: jax.Array, read: Inputs) -> jax.Array:
    """The mean loss of predicting the next token (an encoder's: the token itself)."""
    tokens, segments = read.tokens, read.segments
    if is_decoder(golden.name):
        targets = jnp.roll(tokens, -1, axis=1)
        weights = ((segments > 0) & (jnp.roll(segments, -1, axis=1) > 0)).at[:, -1].set(False)
    else:
        targets, weights = tokens, segments > 0
    sums = vocabulary_loss(readout(golden.spec, params, hidden), targets, weights.astype(jnp.float32))
    return sums.total / sums.weight


@functools.cache
def program(name: str) -> Callable[..., Any]:
    """The outputs by name, the token loss and all other there is, and, of a model that predicts tokens, the gradients
    of their sum: all that is compared of a model as one program of its parameters and inputs."""
    golden, spec = model(name), model(name).spec

    def forward(params: Any, source: Inputs, read: Inputs) -> tuple[jax.Array, Any]:
        hidden, memory, told = states(golden, params, source, read)
        out = {"states": hidden, "hidden": hidden if memory is None else memory.hidden}
        if spec.head is not None:
            out["logits"] = logits(spec, params, hidden)[..., : spec.vocab]
        heads = {head.name: task(spec, params, head.name, hidden, read) for head in spec.tasks}
        out |= {{"nsp": "nsp", "pooled": "pooled"}.get(head, "task"): scores for head, scores in heads.items()}
        if name not in WHOLE:
            return jnp.zeros(()), (out, ())
        losses = token_loss(golden, params, hidden, read), aux_sum(told, "loss")
        losses = losses[0], losses[1] + sum(jnp.square(scores).mean() for scores in heads.values())
        return sum(losses), (out, losses)

    if name not in WHOLE:
        return jax.jit(lambda *arguments: (forward(*arguments)[1], None))

    @jax.jit
    def run(params: Any, source: Inputs, read: Inputs) -> Any:
        (_, told), gradients = jax.value_and_grad(forward, has_aux=True)(params, source, read)
        return told, gradients

    return run


@functools.cache
def computed(name: str) -> Any:
    """What :func:`program` gives for the reference's inputs, as NumPy: an eager JAX operation compiles."""
    golden = model(name)
    return jax.device_get(program(name)(golden.params, golden.inputs, golden.predicted))


def ours(name: str) -> dict[str, np.ndarray]:
    """Our outputs, by name."""
    outputs: dict[str, np.ndarray] = computed(name)[0][0]
    return outputs


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


@pytest.mark.parametrize("name", [name for name in WHOLE if not is_decoder(name)])
def test_unrolled_equals_scanned(name: str) -> None:
    """Those of decoders do in the next test."""
    golden = model(name)
    run = jax.jit(lambda params: states(golden, unstack_layers(golden.spec, params), golden.inputs, golden.predicted))
    np.testing.assert_allclose(run(golden.params)[0], ours(name)["states"], **TIGHT)


@pytest.mark.parametrize("name", [name for name in WHOLE if is_decoder(name)])
def test_prefill_and_steps_equal_the_full_forward(name: str) -> None:
    golden, spec = model(name), model(name).spec
    params, whole = unstack_layers(spec, golden.params), golden.predicted
    batch, length = whole.tokens.shape
    cache = empty_cache(spec, batch, length, jnp.float32, golden.tokens.shape[1] if spec.encoder else 0)

    @jax.jit
    def first(params: Any, inputs: Inputs, cache: Any) -> Any:
        memory = encode(spec, params, golden.inputs)[0] if spec.encoder else None
        return apply(spec, params, inputs, memory=memory, cache=cache)

    step = jax.jit(lambda params, inputs, cache: apply(spec, params, inputs, cache=cache))
    hidden: list[jax.Array] = []
    for start, end in itertools.pairwise([0, *range(9, length + 1)]):
        part = jax.tree.map(lambda a, s=start, e=end: np.asarray(a)[:, s:e], whole)
        out = (step if start else first)(params, part, cache)
        hidden, cache = [*hidden, out.hidden], out.cache
    real = np.asarray(whole.segments) > 0
    np.testing.assert_allclose(np.concatenate(hidden, axis=1)[real], ours(name)["states"][real], **TIGHT)


def packed(inputs: Inputs, cut: int) -> Inputs:
    """As many rows, each of two documents, the first row's tokens cut there: one after the other in the first, the
    other way around in all others."""
    tokens, length = np.asarray(inputs.tokens)[0], inputs.tokens.shape[1]
    sizes = [(cut, length - cut), *[(length - cut, cut)] * (len(inputs.tokens) - 1)]
    starts = [0, *[-cut] * (len(inputs.tokens) - 1)]
    rows = np.stack([np.roll(tokens, start) for start in starts])
    segments = np.asarray([[1] * a + [2] * b for a, b in sizes], np.int32)
    positions = np.asarray([[*range(a), *range(b)] for a, b in sizes], np.int32)
    types = None if inputs.types is None else [np.roll(np.asarray(inputs.types)[0], start) for start in starts]
    return Inputs(*map(jnp.asarray, (rows, positions, segments)), None if types is None else jnp.asarray(types))


@pytest.mark.parametrize("name", WHOLE)
def test_packed_documents_are_the_same_in_any_company(name: str) -> None:
    golden, cut = model(name), 9
    source, read = packed(golden.inputs, cut), packed(golden.predicted, cut)
    # Where the documents change places they change their numbers too: a decoder's segment is that of the encoder.
    first, *others = np.asarray(program(name)(golden.params, source, read)[0][0]["states"])
    assert others
    for other in others:
        np.testing.assert_allclose(np.roll(other, cut, axis=0), first, **TIGHT)


@pytest.mark.parametrize("name", WHOLE)
def test_loss_and_gradients_are_the_references(name: str) -> None:
    golden = model(name)
    (_, losses), gradients = computed(name)
    assert losses[0] == pytest.approx(golden.loss, rel=1e-5)
    if golden.spec.tasks:  # our gradients have those of the other heads in them
        return
    exported = {key: np.array(a) for key, a in export_tensors(golden.config, gradients).items()}
    padding = golden.config_json.get("pad_token_id")
    for key, expected in golden.gradients.items():
        if len(expected) == golden.config.vocab and padding is not None:
            exported[key][padding] = expected[padding]  # PyTorch gives this row of an embedding no gradient
        scale = max(np.abs(expected).max(), 1e-3)  # a bias on keys has none: softmax does not see it
        np.testing.assert_allclose(exported[key], expected, atol=1e-4 * scale, rtol=1e-3, err_msg=key)


@pytest.mark.parametrize("name", WHOLE)
def test_gradients_are_finite_and_reach_every_parameter(name: str) -> None:
    for path, gradient in jax.tree.leaves_with_path(computed(name)[1]):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(gradient).all(), where
        layers = gradient.reshape(gradient.shape[0] if "segment" in where else 1, -1)
        assert np.abs(layers).max(1).min() > 0 or where.endswith("/correction"), where


@pytest.mark.parametrize("name", WHOLE)
def test_a_step_down_lowers_the_loss(name: str) -> None:
    golden, ((_, losses), gradients) = model(name), computed(name)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradients)))
    after = jax.tree.map(lambda p, g: np.asarray(p) - np.float32(0.02 / norm) * g, golden.params, gradients)
    (_, lower), _ = jax.device_get(program(name)(after, golden.inputs, golden.predicted))
    assert sum(lower) < sum(losses)


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
    low, *_ = jax.eval_shape(
        lambda p: states(golden, cast_floats(p, jnp.bfloat16), golden.inputs, golden.predicted), golden.params
    )
    assert low.dtype == jnp.bfloat16
