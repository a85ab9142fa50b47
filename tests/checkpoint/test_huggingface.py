"""Parameters from tensors: which tensor is which parameter, and what of it is read."""

import functools
import json
import warnings
from dataclasses import dataclass, replace

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from lmx.checkpoint.huggingface import (
    InMemory,
    export_tensors,
    import_params,
    import_tensors,
    open_directory,
    read_config,
)
from lmx.checkpoint.huggingface.load import gather
from lmx.checkpoint.huggingface.plan import make_plan
from lmx.errors import UserError
from lmx.models.families.llama import Llama
from lmx.models.model import param_shapes
from lmx.models.names import NameMap, conv1d, linear, stacked, vector
from lmx.models.specs import BlockSpec, Segment, StackSpec
from lmx.nn.module import Part, parameter
from lmx.nn.sublayer import Sublayer
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding
from tests.jitted import init_params


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def same_tree(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, "model_type 'lama', expected llama, .*gpt2"),
        ({"model_type": None}, "model_type None, expected"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
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


def test_all_shapes_that_disagree_are_named(llama):
    with pytest.raises(UserError, match=r"says \(56, 32\); so do .*layers.1.mlp.gate_proj.weight, "):
        import_tensors(
            llama.config, {n: a.T if "gate_proj" in n or "up_proj" in n else a for n, a in llama.tensors.items()}
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_numbers_that_are_none_are_warned_of(llama, bad, dtype):
    tensors = {n: a.astype(dtype) for n, a in llama.tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_tensors(llama.config, tensors, dtype=None)
    tensors[KEY][2, 3] = bad
    with pytest.warns(UserWarning, match=f"the tensor {KEY} holds NaN or infinite values"):
        params = import_tensors(llama.config, tensors, dtype=None)
    assert same(export_tensors(llama.config, params), tensors)


def renamed(config, **changes):
    """The same model with another map."""
    kind = type(config)
    return type("Renamed", (kind,), {"names": replace(kind.names, **changes)})(**vars(config))


def test_a_base_model_and_older_names(gpt2):
    """The hub's gpt2 has no prefix; bert-base-uncased says gamma; models of images and text have one more."""
    config = renamed(
        gpt2.config, base="transformer.", renames=((r"^language_model\.", ""), (r"(ln_\w+)\.gamma$", r"\1.weight"))
    )
    for old in (
        {n.removeprefix("transformer."): a for n, a in gpt2.tensors.items()} | {"h.0.attn.bias": np.zeros(3)},
        {f"language_model.{n}": a for n, a in gpt2.tensors.items()},
        {n.replace("ln_1.weight", "ln_1.gamma"): a for n, a in gpt2.tensors.items()},
    ):
        assert old.keys() != gpt2.tensors.keys()
        params = import_tensors(config, old)
        assert same_tree(params, gpt2.params)
        assert same(export_tensors(config, params), gpt2.tensors)


def test_another_name_is_read_and_does_not_count_twice(llama):
    head = replace(Llama.names.stored["final_norm/scale"], also=("norm.weight", "model.norm.scale"))
    config = renamed(llama.config, stored={**Llama.names.stored, "final_norm/scale": head})
    own = llama.tensors["model.norm.weight"]
    other = {n: a for n, a in llama.tensors.items() if n != "model.norm.weight"} | {"norm.weight": own}
    assert same_tree(import_tensors(config, other), llama.params)
    both = {"norm.weight": own + 1} | llama.tensors
    assert same_tree(import_tensors(config, both), llama.params)


@dataclass(frozen=True)
class Experts(Sublayer):
    """Three experts: parameters only."""

    @property
    def name(self):
        return "experts"

    def inner(self, width):
        return Part(functools.partial(ExpertsModule, width))


class ExpertsModule(nnx.Module):
    def __init__(self, width, declared):
        normal = nnx.initializers.normal(1)
        for name in ("gate", "up"):
            setattr(self, name, parameter(declared, (3, width, 6), ("expert", "embed", "mlp"), normal))
            setattr(self, f"{name}_bias", parameter(declared, (3, 6), ("expert", "mlp"), normal))


class ToyExperts(Llama):
    """A dense layer, then two with experts."""

    def spec(self):
        dense = BlockSpec((self.feed_forward(0),))
        stack = StackSpec((Segment((dense,), 1), Segment((BlockSpec((Experts(),)),), 2)))
        return replace(super().spec(), stack=stack)


EXPERT = "model.layers.{layer}.experts.{expert}."
STACKED = "model.layers.{layer}.experts.gate_up_proj"
ENDS = {n: s for n, s in Llama.names.stored.items() if not n.startswith(("layer/attention", "tasks"))}
SEPARATE = NameMap(
    ENDS
    | {
        "layer/experts/gate": linear(EXPERT + "w1.weight"),
        "layer/experts/up": linear(EXPERT + "w3.weight"),
        "layer/experts/gate_bias": vector(EXPERT + "w1.bias"),
        "layer/experts/up_bias": vector(EXPERT + "w3.bias"),
    }
)
TOGETHER = NameMap(
    ENDS
    | {
        "layer/experts/gate": stacked(conv1d(STACKED, outer=1)),
        "layer/experts/up": stacked(conv1d(STACKED, outer=1)),
        "layer/experts/gate_bias": stacked(vector(STACKED + "_bias", outer=1)),
        "layer/experts/up_bias": stacked(vector(STACKED + "_bias", outer=1)),
    }
)


def toy(names):
    kind = type("Toy", (ToyExperts,), {"names": names})
    return kind(vocab=203, context=48, width=32, heads=4, kv_heads=2, head_dim=12, hidden=56)


def test_one_tensor_for_each_expert():
    config = toy(SEPARATE)
    params = init_params(config.spec(), jax.random.key(0))
    tensors = export_tensors(config, params)
    experts = params["stack"]["segment_1"]["block_0"]["experts"]
    assert np.array_equal(tensors["model.layers.2.experts.1.w3.weight"], experts["up"][1, 1].T)
    assert np.array_equal(tensors["model.layers.1.experts.2.w1.bias"], experts["gate_bias"][0, 2])
    assert sum("experts" in name for name in tensors) == 2 * 3 * 4
    again = import_tensors(config, tensors)
    assert same_tree(again["stack"], params["stack"])
    with pytest.raises(UserError, match=r"lacks model.layers.1.experts.0.w1.weight, .* and 3 more"):
        import_tensors(config, {n: a for n, a in tensors.items() if "w1.weight" not in n})


def test_one_tensor_for_all_experts():
    config = toy(TOGETHER)
    params = init_params(config.spec(), jax.random.key(0))
    tensors = export_tensors(config, params)
    experts = params["stack"]["segment_1"]["block_0"]["experts"]
    both = tensors["model.layers.2.experts.gate_up_proj"]
    assert both.shape == (3, 32, 12)
    assert np.array_equal(both[..., ::2], experts["gate"][1])
    assert np.array_equal(both[..., 1::2], experts["up"][1])
    assert np.array_equal(tensors["model.layers.1.experts.gate_up_proj_bias"][:, 1::2], experts["up_bias"][0])
    assert same_tree(import_tensors(config, tensors)["stack"], params["stack"])


class Counted(InMemory):
    """Tensors that count the bytes that are read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.bytes = 0
        self.names = set()

    def read(self, name, rows=slice(None)):
        array = super().read(name, rows)
        self.bytes += array.nbytes
        self.names.add(name)
        return array


def test_a_process_reads_only_what_its_devices_hold(llama):
    """Layers, rows of the vocabulary, heads and experts that lie elsewhere are not read."""
    config = toy(SEPARATE)
    tensors = export_tensors(config, init_params(config.spec(), jax.random.key(0)))
    full, counted, plan = import_tensors(config, tensors), Counted(tensors), make_plan(config)

    def part(path, *box):
        whole = functools.reduce(lambda tree, key: tree[key], path.split("/"), full)
        held = [(holder, which, holder.name) for holder, which in plan.by_path()[path]]
        counted.bytes, counted.names = 0, set()
        assert np.array_equal(gather(box, np.dtype(np.float32), held, counted), whole[box])
        return counted.bytes

    every = slice(0, 32)
    assert part("embedding/table", slice(128, 256), every) == 75 * 32 * 4
    assert part("embedding/table", slice(203, 256), every) == 0
    assert part("embedding/table", slice(0, 128), slice(8, 16)) == 128 * 32 * 4
    block = "stack/segment_1/block_0/experts"
    assert part(f"{block}/up", slice(1, 2), slice(2, 3), every, slice(0, 3)) == 3 * 32 * 4
    assert counted.names == {"model.layers.2.experts.2.w3.weight"}
    assert part("stack/segment_0/block_0/mlp/gate/kernel", slice(0, 1), every, slice(14, 28)) == 14 * 32 * 4


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=2), MeshConfig(data=4, tensor=2)])
@pytest.mark.parametrize("dtype", [None, ml_dtypes.bfloat16])
def test_sharded_import_is_the_same(golden, mesh, dtype):
    sharding = Sharding(build_mesh(mesh), Rules())
    params = import_params(golden.config, InMemory(golden.tensors), dtype=dtype, sharding=sharding)
    assert same_tree(params, import_tensors(golden.config, golden.tensors, dtype=dtype))
    assert params["embedding"]["table"].sharding == sharding.named(("vocab", "embed"))


def test_a_mesh_that_does_not_divide(llama):
    rules = Rules(layers=("fsdp",))
    with pytest.raises(UserError, match=r"the axis 'layers' of .* into 8"):
        import_params(llama.config, InMemory(llama.tensors), sharding=Sharding(build_mesh(MeshConfig(fsdp=8)), rules))


def directory(path, golden, **changes):
    (path / "config.json").write_text(json.dumps(golden.config_json | changes))
    save_file(golden.tensors, path / "model.safetensors")
    return path


def test_a_directory(tmp_path, golden):
    checkpoint = open_directory(directory(tmp_path, golden))
    assert checkpoint.config == golden.config
    assert checkpoint.config_json == golden.config_json
    assert same_tree(import_params(checkpoint.config, checkpoint.tensors), golden.params)


def test_a_quantized_directory(tmp_path, llama):
    """Block fp8 of whole numbers is exact."""
    name, block = "model.layers.0.mlp.gate_proj.weight", {"quant_method": "fp8", "weight_block_size": [16, 16]}
    whole = np.random.default_rng(0).integers(-8, 9, (56, 32))
    stored = {n: a.astype(ml_dtypes.bfloat16) for n, a in llama.tensors.items()}
    stored |= {name: whole.astype(ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": np.full((4, 2), 0.5, np.float32)}
    directory(tmp_path, llama, quantization_config=block)
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = open_directory(tmp_path)
    params = import_params(checkpoint.config, checkpoint.tensors)
    kernel = params["stack"]["segment_0"]["block_0"]["mlp"]["gate"]["kernel"]
    assert kernel.dtype == ml_dtypes.bfloat16
    assert np.array_equal(np.asarray(kernel[0], np.float32), whole.T / 2)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json; is it a Hugging Face model directory"),
        (lambda d: (d / "config.json").write_text("{,"), "config.json is not JSON"),
        (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin only, a pickle"),
    ],
)
def test_directories_that_are_not_models(tmp_path, llama, damage, words):
    damage(directory(tmp_path, llama))
    with pytest.raises(UserError, match=words):
        open_directory(tmp_path)
    with pytest.raises(UserError, match="nowhere is not a directory"):
        open_directory(tmp_path / "nowhere")
