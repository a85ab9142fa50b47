from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from lmx.checkpoint.huggingface import export_tensors, import_tensors, read_config
from lmx.errors import UserError
from lmx.models.families import Gpt2, Llama
from lmx.models.model import init_params, param_shapes
from lmx.models.specs import BlockSpec, Segment, StackSpec


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def test_configurations(gpt2, llama):
    assert gpt2.config == Gpt2(vocab=203, context=48, layers=2, width=32, heads=4, eps=1e-3)
    assert llama.config == Llama(
        vocab=203,
        context=48,
        layers=2,
        width=32,
        heads=4,
        kv_heads=2,
        head_dim=12,
        hidden=56,
        rope_theta=500.0,
        tied=False,
        eps=1e-3,
    )


def test_older_files_keep_the_rotary_numbers_at_the_top(llama):
    rope = {"rope_parameters": None, "rope_theta": 77.0, "rope_scaling": None, "head_dim": None}
    config = read_config(llama.config_json | rope)
    assert (config.rope_theta, config.head_dim) == (77.0, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, "model_type 'lama', expected llama, gpt2"),
        ({"model_type": None}, "model_type None, expected"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type to 'llama3'"),
        ({"attention_bias": True}, "attention_bias to True"),
    ],
)
def test_configurations_that_are_not_ours(llama, changes, words):
    with pytest.raises(UserError, match=words):
        read_config(llama.config_json | changes)


def test_export_inverts_import_bitwise(golden):
    assert same(export_tensors(golden.config, golden.params), golden.tensors)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_dtypes_are_kept_if_asked(golden, dtype):
    tensors = {name: a.astype(dtype) for name, a in golden.tensors.items()}
    kept = import_tensors(golden.config, tensors, dtype=None)
    assert {a.dtype for a in jax.tree.leaves(kept)} == {np.dtype(dtype)}
    assert same(export_tensors(golden.config, kept), tensors)
    assert {a.dtype for a in jax.tree.leaves(import_tensors(golden.config, tensors))} == {np.dtype(np.float32)}


def test_import_inverts_export_of_fresh_parameters(golden):
    fresh = init_params(golden.spec, jax.random.key(0))
    back = import_tensors(golden.config, export_tensors(golden.config, fresh))
    assert jax.tree.map(np.shape, back) == jax.tree.map(lambda s: s.shape, param_shapes(golden.spec))
    vocab = golden.config.vocab
    for part in {"embedding", "head"} & back.keys():
        assert not back[part]["table"][vocab:].any()
        fresh[part]["table"] = fresh[part]["table"].at[vocab:].set(0)
    assert jax.tree.all(jax.tree.map(np.array_equal, fresh, back))


def test_layers_of_several_segments_keep_their_numbers(llama):
    """Three segments, one of them a pattern of two blocks: 1 + 2 x 2 + 1 = 6 layers."""
    block = llama.spec.stack.segments[0].pattern[0]
    stack = StackSpec((Segment((block,), 1), Segment((block, BlockSpec(block.sublayers)), 2), Segment((block,), 1)))

    class Patterned(Llama):
        def spec(self):
            return replace(super().spec(), stack=stack)

    config = Patterned(**vars(llama.config))
    one = {n: a for n, a in llama.tensors.items() if "layers." not in n}
    layer = {n: a for n, a in llama.tensors.items() if "layers.0." in n}
    numbered = {n.replace("layers.0.", f"layers.{i}."): np.full_like(a, i) for i in range(6) for n, a in layer.items()}
    params = import_tensors(config, one | numbered)
    layers = [
        params["stack"][f"segment_{s}"][f"block_{b}"]["mlp"]["up"]["kernel"][:, 0, 0].tolist()
        for s, b in ((0, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert layers == [[0], [1, 3], [2, 4], [5]]
    assert same(export_tensors(config, params), one | numbered)


def test_buffers_and_tied_tables_are_ignored(gpt2):
    extra = {
        "transformer.h.0.attn.bias": np.zeros(3),
        "lm_head.weight": gpt2.tensors["transformer.wte.weight"],
    }
    params = import_tensors(gpt2.config, gpt2.tensors | extra)
    assert same(export_tensors(gpt2.config, params), gpt2.tensors)


KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(KEY), f"the checkpoint lacks {KEY}; is it a llama of these sizes?"),
        (lambda t: t.update(extra=t[KEY]), "the checkpoint has the unexpected extra; is it a llama"),
        (
            lambda t: t.update(other=t.pop(KEY)),
            f"the checkpoint lacks {KEY} and has the unexpected other; is it a llama",
        ),
        (
            lambda t: t.update({KEY: t[KEY].T}),
            rf"the tensor {KEY} has the shape \(32, 24\), but the configuration says \(24, 32\)",
        ),
    ],
    ids=["missing", "unexpected", "both", "shape"],
)
def test_tensors_that_do_not_fit_are_named(llama, change, words):
    tensors = dict(llama.tensors)
    change(tensors)
    with pytest.raises(UserError, match=words):
        import_tensors(llama.config, tensors)


def test_a_long_list_is_cut(llama):
    with pytest.raises(UserError, match=r"lacks model.embed_tokens.weight, .* and 18 more;"):
        import_tensors(llama.config, {})
