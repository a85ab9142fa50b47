"""Task heads, and what encoders' checkpoints leave open: older names, bare models, poolers, labels."""

import warnings
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import Golden, load_golden

from lmx.checkpoint.huggingface import export_tensors, import_tensors, read_config
from lmx.errors import UserError
from lmx.models.config import ModelConfig
from lmx.models.config_map import Task
from lmx.models.families.bert import Bert
from lmx.models.families.gpt2 import Gpt2
from lmx.nn.head import pooled
from tests.jitted import apply, init_params, task

BERT = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "directionality": "bidi",
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "pooler_fc_size": 768,
    "pooler_type": "first_token_transform",
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
ROBERTA = {
    "architectures": ["RobertaForMaskedLM"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "roberta",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 50265,
}
MODERNBERT = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "classifier_pooling": "mean",
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "model_type": "modernbert",
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "reference_compile": True,
    "tie_word_embeddings": True,
    "vocab_size": 50368,
}


def bare(golden: Golden, **more: Any) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """The golden BERT as a checkpoint of the class without heads, which has no prefix, with the names of 2018."""
    renamed = {
        name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): a
        for name, a in golden.tensors.items()
        if name.startswith("bert.")
    }
    return read_config({**golden.config_json, "architectures": ["BertModel"], **more}), renamed


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BERT, {"context": 512, "eps": 1e-12, "types": 2}),
        (ROBERTA, {"context": 512, "padding": 1, "types": 1}),
        (MODERNBERT, {"every": 3, "window": 128, "theta": 160e3, "window_theta": 10e3, "pooling": "mean"}),
    ],
)
def test_configurations_of_the_hub_are_read_without_a_warning(
    content: dict[str, Any], expected: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = read_config(content)
    assert {key: getattr(config, key) for key in expected} == expected
    assert read_config(config.to_huggingface()) == config


@pytest.mark.parametrize(
    ("content", "change", "message"),
    [
        (BERT, {"is_decoder": True}, "is_decoder"),
        (BERT, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        (BERT, {"hidden_act": "relu"}, "hidden_act"),
        (BERT, {"architectures": ["BertLMHeadModel"]}, "BertLMHeadModel"),
        (MODERNBERT, {"layer_types": ["sliding_attention", "full_attention"]}, "full_attention"),
        (MODERNBERT, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rotary"),
    ],
)
def test_other_computations_are_refused(content: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config({**content, **change})


def test_layer_types_say_which_layers_see_everything() -> None:
    kinds = ["full_attention", "sliding_attention"] * 11
    newer = {key: value for key, value in MODERNBERT.items() if "global_attn" not in key}
    assert read_config({**newer, "layer_types": kinds}) == replace(read_config(MODERNBERT), every=2)


def test_a_local_base_of_null_is_the_global_one() -> None:
    config = read_config({**MODERNBERT, "local_rope_theta": None})
    assert (config.theta, config.window_theta) == (160e3, 160e3)


def test_bare_models_of_2018_give_the_poolers_embedding() -> None:
    golden = load_golden("bert")
    config, tensors = bare(golden)
    config = config.for_tensors(tensors)
    params, spec = import_tensors(config, tensors), config.spec()
    hidden = apply(spec, params, golden.inputs).hidden
    real = golden.arrays["segments"] > 0
    np.testing.assert_allclose(np.asarray(hidden)[real], golden.arrays["hidden"][real], atol=1e-4)
    embedding = task(spec, params, "pooled", hidden, golden.inputs)
    np.testing.assert_allclose(embedding, golden.arrays["pooled"], atol=1e-4)
    assert "pooler.dense.weight" in export_tensors(config, params)


def test_without_a_pooler_the_embedding_is_the_mean_of_the_tokens() -> None:
    golden = load_golden("bert")
    config, tensors = bare(golden)
    tensors = {name: a for name, a in tensors.items() if "pooler" not in name}
    config = config.for_tensors(tensors)
    assert read_config(config.to_huggingface()) == config
    params, spec = import_tensors(config, tensors), config.spec()
    hidden = apply(spec, params, golden.inputs).hidden
    row = np.asarray(hidden)[1][golden.arrays["segments"][1] > 0].mean(0)
    np.testing.assert_allclose(task(spec, params, "pooled", hidden, golden.inputs)[1], row, atol=1e-5)


def test_masked_lm_passes_over_the_other_heads_of_its_checkpoint() -> None:
    golden = load_golden("bert")
    config = read_config({**golden.config_json, "architectures": ["BertForMaskedLM"]})
    params = import_tensors(config, golden.tensors)
    assert "tasks" not in params
    np.testing.assert_array_equal(params["head"]["bias"], golden.params["head"]["bias"])


def test_bare_decoders_embed_a_row_by_its_last_token() -> None:
    golden = load_golden("llama_sequence")
    config = read_config({**golden.config_json, "architectures": ["LlamaModel"]})
    tensors = {n.removeprefix("model."): a for n, a in golden.tensors.items() if n.startswith("model.")}
    params, spec = import_tensors(config, tensors), config.spec()
    assert set(export_tensors(config, params)) == set(tensors)
    hidden = apply(spec, params, golden.inputs).hidden
    last = golden.arrays["segments"].sum(1) - 1
    expected = np.take_along_axis(np.asarray(hidden), last[:, None, None], 1)[:, 0]
    np.testing.assert_array_equal(task(spec, params, "pooled", hidden, golden.inputs), expected)


def test_labels_are_counted_for_classes_only() -> None:
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}}
    classifier = {**BERT, "architectures": ["BertForSequenceClassification"]}
    assert read_config({**classifier, **labels}).classes == 3
    assert read_config({**classifier, "num_labels": 4}).classes == 4
    assert read_config({**BERT, **labels}).classes == 2


@pytest.mark.parametrize(
    ("what", "name"), [("token_classification", "classifier.weight"), ("sequence_classification", "score.weight")]
)
def test_a_class_may_store_a_head_elsewhere(what: Task, name: str) -> None:
    config = Gpt2(vocab=9, context=4, layers=1, width=4, heads=2, task=what)
    tensors = export_tensors(config, init_params(config.spec(), jax.random.key(0)))
    assert name in tensors


def test_pooling_passes_over_padding() -> None:
    hidden = jnp.arange(8.0).reshape(1, 4, 2)
    segments = jnp.array([[0, 1, 1, 0]])
    got = {pool: pooled(hidden, segments, pool)[0].tolist() for pool in ("first", "last", "mean")}
    assert got == {"first": [2, 3], "last": [4, 5], "mean": [3, 4]}


def test_dropout_in_a_head_needs_a_key() -> None:
    sizes = {"vocab": 9, "context": 4, "layers": 1, "width": 4, "heads": 2, "hidden": 4}
    config = Bert(**sizes, dropout=0.5, classes=64, task="sequence_classification")
    spec = config.spec()
    params, golden = init_params(spec, jax.random.key(0)), load_golden("bert")
    hidden = jnp.ones((3, 24, 4))
    still = [task(spec, params, "classes", hidden, golden.inputs) for _ in range(2)]
    moved = task(spec, params, "classes", hidden, golden.inputs, jax.random.key(1))
    assert (still[0] == still[1]).all()
    assert (still[0] != moved).any()
