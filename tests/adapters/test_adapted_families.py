"""Adapters in the layers of families whose kernels are not all plain linear maps."""

import jax
import numpy as np
import pytest
from goldens import load_golden

from lmx.adapters.adapter import Dora, Lora
from lmx.models.model import apply, cast_floats, encode, logits, param_axes
from lmx.optim.names import name_of, names, pick, put
from tests.jitted import plain, unstack_layers


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("mixtral", Dora(rank=2, base="nf4")),
        pytest.param("deepseek_v3", Lora(rank=2), marks=pytest.mark.slow),
        pytest.param("gpt_oss", Lora(rank=2, base="int8"), marks=pytest.mark.slow),
        pytest.param("palm", Dora(rank=2), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_with_adapters_computes_what_it_does_merged(family, adapter):
    golden = load_golden(family)
    spec, axes = golden.spec, param_axes(golden.spec)

    @jax.jit
    def run(params):
        params = cast_floats(params, np.float32)  # the rest of a quantized base is bfloat16
        return logits(spec, params, apply(spec, params, golden.predicted).hidden)

    @jax.jit
    def adapted(params):
        params = adapter.adapt(params, axes, jax.random.key(0))
        own = pick(params, adapter.trains)
        keys = iter(jax.random.split(jax.random.key(1), 1000))
        return put(params, jax.tree.map(lambda a: a + 0.05 * jax.random.normal(next(keys), a.shape), own))

    params = adapted(golden.params)
    real = np.asarray(golden.predicted.segments) > 0
    one, two, before = (np.asarray(run(p))[real] for p in (params, plain(params), golden.params))
    # A mixture's router may choose otherwise at a near tie: that rounding is a matter of rows, not of adapters.
    near = np.abs(one - two).max(-1) < 2e-3
    assert near.mean() > 0.95
    assert np.abs(one - before).max() > 1e-2


def test_decoding_takes_adapters_unstacked(llama):
    adapter = Lora(rank=2)
    axes = param_axes(llama.spec)
    params = jax.jit(lambda p: adapter.adapt(p, axes, jax.random.key(0)))(llama.params)
    alone = unstack_layers(llama.spec, params)
    run = jax.jit(lambda p: logits(llama.spec, p, apply(llama.spec, p, llama.inputs).hidden))
    found = run(alone)
    real = np.asarray(llama.inputs.segments) > 0
    np.testing.assert_allclose(np.asarray(found)[real][:, : llama.spec.vocab], llama.logits[real], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_tables_have_adapters_too(family):
    """Tied or not, of one stack or shared by two: what is computed is what the merged table gives."""
    golden, adapter = load_golden(family), Lora(rank=1, table_rank=2, targets=("*query*",))
    spec, axes = golden.spec, param_axes(golden.spec)
    params = jax.jit(lambda params: adapter.adapt(params, axes, jax.random.key(0)))(golden.params)
    tables = [name for name in names(pick(params, adapter.trains)) if "table" in name]
    assert len(tables) == 2 * (1 + ("head" in golden.params and "table" in golden.params["head"]))
    moved = jax.tree.map_with_path(
        lambda path, a: a + 0.1 * np.arange(a.size).reshape(a.shape) / a.size if name_of(path) in tables else a, params
    )
    merged = plain(moved)

    @jax.jit
    def run(params):
        memory = None if spec.encoder is None else encode(spec, params, golden.inputs)[0]
        return logits(spec, params, apply(spec, params, golden.predicted, memory=memory).hidden)

    one, two, before = (np.asarray(run(p)) for p in (moved, merged, params))
    np.testing.assert_allclose(one, two, atol=2e-5)
    assert np.abs(one - before).max() > 1e-3
    np.testing.assert_array_equal(before, np.asarray(run(golden.params)))
