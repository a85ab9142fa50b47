"""PEFT's form against what merging the same adapter does to every tensor of a checkpoint."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from goldens import load_golden

from lmx.adapters.adapter import Dora, Lora
from lmx.adapters.base import merge
from lmx.adapters.peft import CONFIG, WEIGHTS, read_peft, write_peft
from lmx.checkpoint.huggingface.export import export_tensors
from lmx.checkpoint.huggingface.files import read_header
from lmx.checkpoint.huggingface.tensors import InFiles
from lmx.errors import UserError
from lmx.models.model import param_axes
from lmx.optim.names import name_of, pick

CASES = (("gpt2", Dora), ("llama", Lora), ("phi3", Dora), ("bert", Lora), ("t5", Lora), ("modernbert", Lora))
"""Linear and Conv1D weights; parameters side by side in one tensor; encoders; two stacks."""


def adapted(config, params, adapter):
    """What was trained, drawn at random, and the merged parameters."""
    axes = param_axes(config.spec())
    shapes = jax.eval_shape(lambda: pick(adapter.adapt(params, axes, jax.random.key(0)), adapter.trains))
    rng = np.random.default_rng(1)
    own = jax.tree.map(lambda a: 0.1 * rng.normal(size=a.shape).astype(np.float32), shapes)
    return own, merged_with(adapter, params, axes, own)


def merged_with(adapter, params, axes, own):
    return jax.device_get(jax.jit(lambda params, own: merge(adapter, params, axes, own))(params, own))


def expected_weight(tensors, config, module: str, base: np.ndarray) -> np.ndarray:
    """PEFT's own merge, in float64: W + scale B A, its rows brought to the lengths of the magnitudes (DoRA)."""
    a, b = (tensors.read(f"base_model.model.{module}.lora_{part}.weight").astype(np.float64) for part in "AB")
    rank = a.shape[0]
    scale = config["alpha_pattern"].get(module, config["lora_alpha"]) / rank
    assert rank == config["rank_pattern"].get(module, config["r"])
    weight = (base.T if config["fan_in_fan_out"] else base) + scale * b @ a
    if config["use_dora"]:
        lengths = tensors.read(f"base_model.model.{module}.lora_magnitude_vector")
        weight = weight * (lengths / np.linalg.norm(weight, axis=1))[:, None]
    return weight.T if config["fan_in_fan_out"] else weight


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_peft_merges_to_what_lmx_merges_to(family, kind, tmp_path):
    golden = load_golden(family)
    adapter = kind(rank=2, alpha=6.0)
    own, merged = adapted(golden.config, golden.params, adapter)
    write_peft(golden.config, adapter, own, "base", tmp_path)
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), InFiles(read_header(tmp_path / WEIGHTS))
    before, after = (export_tensors(golden.config, p) for p in (golden.params, merged))
    changed = {name.removesuffix(".weight") for name in before if not np.array_equal(before[name], after[name])}
    assert changed == set(config["target_modules"])
    for module in changed:
        expected = expected_weight(tensors, config, module, before[f"{module}.weight"].astype(np.float64))
        np.testing.assert_allclose(after[f"{module}.weight"], expected, atol=2e-5, err_msg=module)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_adapters_of_tables_are_embeddings_or_heads(family, tmp_path):
    """Their update of the table is PEFT's, whose A and B of an embedding lie the other way round than a head's."""
    golden, adapter = load_golden(family), Lora(rank=2, alpha=6.0, table_rank=3, targets=("*mlp/up*",))
    own, merged = adapted(golden.config, golden.params, adapter)
    write_peft(golden.config, adapter, own, "base", tmp_path)
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), InFiles(read_header(tmp_path / WEIGHTS))
    before, after = (export_tensors(golden.config, p) for p in (golden.params, merged))
    tied = golden.spec.head.tied
    assert config["ensure_weight_tying"] is tied
    tables = [m for m in config["target_modules"] if config["rank_pattern"].get(m) == 3]
    assert len(tables) == (1 if tied else 2)
    for module in tables:
        kinds = ("lora_A.weight", "lora_B.weight") if "head" in module else ("lora_embedding_A", "lora_embedding_B")
        a, b = (tensors.read(f"base_model.model.{module}.{kind}").astype(np.float64) for kind in kinds)
        update = config["alpha_pattern"][module] / 3 * (b @ a)
        expected = before[f"{module}.weight"] + (update if "head" in module else update.T)
        np.testing.assert_allclose(after[f"{module}.weight"], expected, atol=2e-5)
    with pytest.raises(UserError, match="only where the embedding is called embed_tokens"):
        write_peft(load_golden("gpt2").config, adapter, {"embedding": own["embedding"]}, "base", tmp_path)
    with pytest.raises(UserError, match="PEFT's DoRA has lengths of tables"):
        write_peft(golden.config, Dora(rank=2, alpha=6.0, table_rank=3, targets=("*mlp/up*",)), own, "base", tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_is_read_back(family, tmp_path):
    golden = load_golden(family)
    adapter = Lora(rank=2, table_rank=int(family == "llama"), targets=("*attention/out/*", "*mlp/*"))
    own, merged = adapted(golden.config, golden.params, adapter)
    write_peft(golden.config, adapter, own, "base", tmp_path)
    wider = replace(adapter, rank=3, table_rank=3, alpha=1.0)
    again = read_peft(golden.config, wider, tmp_path)
    for name, leaf in ((name_of(path), leaf) for path, leaf in jax.tree.leaves_with_path(again)):
        assert 3 in leaf.shape, name
    axes = param_axes(golden.config.spec())
    same = merged_with(wider, golden.params, axes, again)
    one, two = (export_tensors(golden.config, params) for params in (same, merged))  # without the padding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)


def test_what_has_no_such_form_is_refused(tmp_path):
    golden = load_golden("mixtral")
    adapter = Lora(rank=2)
    own, _ = adapted(golden.config, golden.params, adapter)
    with pytest.raises(UserError, match="no adapters of experts"):
        write_peft(golden.config, adapter, own, "base", tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"")
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match="of the type 'IA3'"):
        read_peft(golden.config, adapter, tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "use_qalora": True}))
    with pytest.raises(UserError, match="sets use_qalora"):
        read_peft(golden.config, adapter, tmp_path)
