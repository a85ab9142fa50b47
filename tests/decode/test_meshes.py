"""Decoding on meshes: the same tokens as on one device in every layout, and the collectives of Pope et al. 2022."""

import dataclasses
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.data.config import DataConfig
from lmx.data.tokenizer import TextTokenizer
from lmx.decode.generate import decoder_inputs
from lmx.decode.loaded import Model
from lmx.decode.loop import Decoding, Program, advance, prefill
from lmx.decode.places import Places, unstacker
from lmx.decode.sampling import Sampling
from lmx.errors import UserError
from lmx.eval.perplexity import evaluate
from lmx.models.config import ModelConfig
from lmx.models.families.deepseek_v3 import DeepseekV3
from lmx.models.families.llama import Llama
from lmx.models.families.mixtral import Mixtral
from lmx.models.families.t5 import T5
from lmx.models.model import param_axes
from lmx.sharding.collectives import Collective, collectives
from lmx.sharding.layouts import LAYOUTS, find_layout
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding, use_sharding
from tests.jitted import init_params

SIZES: dict[str, Any] = {"context": 128, "width": 32, "heads": 8, "hidden": 64}
DENSE = Llama(vocab=320, layers=1, kv_heads=8, head_dim=4, **SIZES)
MODELS: dict[str, ModelConfig] = {
    "dense": DENSE,
    "gqa": replace(DENSE, kv_heads=4),
    "mqa": replace(DENSE, kv_heads=1),
    "deep": replace(DENSE, layers=2),
    "moe": Mixtral(vocab=320, layers=1, kv_heads=4, head_dim=4, experts=8, **SIZES),
    "latent": DeepseekV3(
        vocab=320, layers=1, dense_layers=1, q_lora=16, kv_lora=8, nope_dim=4, rope_dim=4, value_dim=4, **SIZES
    ),
    "t5": T5(vocab=320, encoder_layers=1, decoder_layers=1, head_dim=4, **SIZES),
}
PROMPTS = ["the quick", "three hundred small birds sing in the old", "", "dog while", "a", "the garden", "fox", "lazy"]
NEW = 6
FAST = [
    ("mqa", "2d_weight_stationary_mqa"),
    ("moe", "weight_gathered_xy"),
    ("t5", "1d_weight_stationary_mqa"),
    ("deep", "3d"),
    ("gqa", "context"),
]
ALL = [(model, layout) for layout in LAYOUTS for model in MODELS if (model, layout) not in FAST]


def params_of(config: ModelConfig) -> Any:
    """Random, and lively: far from uniform."""
    made = jax.device_get(init_params(config.spec(), jax.random.key(3)))
    params = jax.tree.map(lambda a: a * np.float32(8) if a.ndim > 2 else a, made)
    params["embedding"]["table"] = params["embedding"]["table"] * np.float32(50)
    return params


def on(config: ModelConfig, tokenizer: TextTokenizer, layout: str, **more: Any) -> Model:
    found = find_layout(layout)
    sharding, axes = Sharding(build_mesh(found.mesh), found.rules), param_axes(config.spec())
    params = params_of(config)
    sharding.check_divides(axes, params)
    return Model(config, jax.device_put(params, sharding.tree(axes)), tokenizer, sharding=sharding, **more)


@pytest.fixture(scope="module")
def expected(tokenizer: TextTokenizer) -> Any:
    """By name: the model on one device, and its completions."""
    found: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in found:
            model = Model(MODELS[name], params_of(MODELS[name]), tokenizer)
            found[name] = model, model.generate(PROMPTS, max_new_tokens=NEW, temperature=0)
        return found[name]

    return of


def tokens_of(name: str) -> list[np.ndarray]:
    """Three rows of a length that no mesh divides; of an encoder-decoder, for both."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, 300, (3, length)) for length in ((7, 5) if name == "t5" else (7,))]


def check_same(model: Model, expected: Any, name: str, *, reads: bool) -> None:
    """The same completions, and (``reads``) the same logits of whole rows."""
    single, completions = expected(name)
    found = model.generate(PROMPTS, max_new_tokens=NEW, temperature=0)
    assert [c.tokens for c in found] == [c.tokens for c in completions]
    for one, other in zip(found, completions, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    if reads:
        wanted = single.logits(*tokens_of(name))
        np.testing.assert_allclose(model.logits(*tokens_of(name)), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("name", "layout"), FAST)
def test_a_layout_changes_where_and_not_what(name, layout, tokenizer, expected):
    assert len({t for c in expected(name)[1] for t in c.tokens}) > 8  # lively enough to be a test
    whole_rows_differ = layout in ("3d", "context")  # the others lay them as they lay prompts
    check_same(on(MODELS[name], tokenizer, layout), expected, name, reads=whole_rows_differ)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), ALL)
def test_every_layout_with_every_model(name, layout, tokenizer, expected):
    found = find_layout(layout)
    sharding, config = Sharding(build_mesh(found.mesh), found.rules), MODELS[name]
    heads = getattr(config, "kv_heads", 8)
    if heads % sharding.ways("kv_heads") or (layout == "3d" and name != "deep"):
        pytest.skip("the mesh does not divide the key heads, or the layers")
    check_same(on(config, tokenizer, layout), expected, name, reads=True)


def test_prompts_are_read_by_one_layout_and_tokens_written_by_another(tokenizer, expected):
    model = on(MODELS["mqa"], tokenizer, "2d_weight_stationary_mqa", reading=find_layout("weight_gathered_xyz").rules)
    check_same(model, expected, "mqa", reads=False)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What was compiled for a layout: the collectives of reading 16 prompts, and those of one step of writing."""

    spec: Any
    reading: list[Collective]
    writing: list[Collective]
    state: Decoding

    def kinds(self, *axes: str) -> set[str]:
        """Of a step, between the layers' activations: those larger than what choosing a token takes."""
        return {c.kind for c in self.writing if c.axes == axes and c.sent > SMALL}


SMALL = 500
"""Bytes: what a norm's sums over a split width take, or the choice of a token among split logits."""
WIDE = Llama(vocab=512, context=128, layers=1, width=64, heads=8, kv_heads=8, head_dim=16, hidden=256)


def compiled(layout: str, config: Llama = WIDE) -> Compiled:
    found, spec = find_layout(layout), config.spec()
    sharding = Sharding(build_mesh(found.mesh), found.rules)
    places, sampling = Places.of(sharding), Sampling(temperature=0)
    params = jax.device_put(init_params(spec, jax.random.key(0)), sharding.tree(param_axes(spec)))
    ready = unstacker(spec, jnp.dtype(jnp.float32), places)(params)
    inputs, _ = decoder_inputs(spec, [[1, 2, 3]] * 16)
    by_row, shared = (inputs, np.zeros(16, np.uint32)), (np.array([0], np.int32), sampling.values())
    (inputs, seeds), (stops, values) = places.put(by_row, shared)
    program = Program(spec, sampling.filters, places.writing)
    keys = jax.vmap(jax.random.key)(seeds)
    read = prefill.lower(program, ready, inputs, keys, stops, values, slots=64).compile()
    state = read(ready, inputs, keys, stops, values)

    def step(params: Any, state: Decoding) -> Decoding:
        with use_sharding(places.writing):
            return advance(program, params, state, state.done)

    write = jax.jit(step).lower(ready, state).compile()
    texts = (program.as_text() for program in (read, write))
    return Compiled(spec, *(collectives(text, sharding.mesh.shape) for text in texts), state)


def cache_part(state: Decoding) -> float:
    """The share of the cache's bytes that a device holds."""
    arrays = [a for streams in state.cache.layers for own in streams.values() for a in own.values()]
    return sum(a.addressable_shards[0].data.nbytes for a in arrays) / sum(a.nbytes for a in arrays)


def test_1d_weight_stationary_sums_over_tensor_and_moves_no_weight():
    program = compiled("1d_weight_stationary")
    assert program.kinds("tensor") == {"all-reduce"}
    # One sum after the embedding, the attention and the feed-forward layer each, [16, 1, 64] float32 by ring.
    sums = [c for c in program.writing if c.kind == "all-reduce" and c.sent > SMALL]
    assert [c.sent for c in sums] == [2 * 7 / 8 * 16 * 64 * 4] * 3
    assert cache_part(program.state) == 1 / 8


def test_2d_weight_stationary_sums_over_both_axes_and_moves_no_weight():
    program = compiled("2d_weight_stationary")
    assert program.kinds("tensor") == program.kinds("fsdp") == {"all-reduce"}
    assert {c.axes for c in program.writing} == {("tensor",), ("fsdp",)}
    assert max(c.sent for c in program.writing) <= 16 * 256 * 4  # of activations; the smallest weight is 64 x 128 / 8


def test_weight_gathered_gathers_weights_and_no_activations():
    program = compiled("weight_gathered_xyz")
    weights = sum(a.size for a in jax.tree.leaves(init_params(program.spec, jax.random.key(0))) if a.ndim > 1)
    for found in (program.reading, program.writing):
        assert {c.kind for c in found} == {"all-gather"}
        # A device receives all of every weight but its own eighth.
        assert sum(c.total for c in found) == pytest.approx(weights * 4 * 7 / 8, rel=0.01)
    assert cache_part(program.state) == 1 / 8


def test_weight_gathered_x_gathers_over_x_and_sums_over_the_rest():
    program = compiled("weight_gathered_x")
    assert {c.kind for c in program.reading if c.axes == ("fsdp",)} == {"all-gather"}
    assert {c.kind for c in program.reading if c.axes == ("tensor",) and c.sent > 20_000} == {"all-reduce"}


def test_batch_split_attention_exchanges_queries_and_splits_the_cache_by_all_devices():
    program = compiled("2d_weight_stationary_mqa", replace(WIDE, kv_heads=1))
    assert cache_part(program.state) == 1 / 8
    exchanged = [c.axes for c in program.writing if c.kind == "all-to-all"]
    assert exchanged == [("tensor",)] * 2  # the queries, and what they gathered


@pytest.mark.parametrize(
    ("mesh", "rules", "words"),
    [
        (
            MeshConfig(data=1, tensor=8),
            Rules(),
            "the axis 'kv_heads' of .* into 8 .* size 4; choose a mesh that splits it into 4",
        ),
        (
            MeshConfig(data=1, tensor=8),
            Rules(kv_heads=()),
            "the mesh splits 'act_kv_heads' into 8 .* its size 4; choose a mesh that splits it into 4",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_says_what_does(mesh, rules, words, tokenizer):
    params = params_of(MODELS["gqa"])
    model = Model(MODELS["gqa"], params, tokenizer, sharding=Sharding(build_mesh(mesh), rules))
    with pytest.raises(UserError, match=words):
        model.generate(PROMPTS)


@pytest.mark.parametrize(
    ("mesh", "batch", "words"),
    [
        (MeshConfig(data=8), 6, "divide --batch 6; the nearest that it divides is 8"),
        (MeshConfig(data=1, sequence=8), 8, "the length 30; the nearest length that it divides is 32"),
        (MeshConfig(data=1, stage=8), 8, "8 stages of 1 chunks do not divide the 1 repeats"),
    ],
)
def test_eval_on_a_mesh_that_does_not_divide_says_what_does(mesh, batch, words, tokenizer):
    model = Model(
        DENSE, {"embedding": {"table": jnp.zeros(1)}}, tokenizer, sharding=Sharding(build_mesh(mesh), Rules())
    )
    with pytest.raises(UserError, match=words):
        evaluate(model, DataConfig(), length=30 if batch == 8 else 32, batch=batch)
