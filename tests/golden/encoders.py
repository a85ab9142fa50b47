"""Tiny configurations of the encoder-only families, and of models with task heads."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import transformers as hf
from decoders import Made, common, llama
from sizes import Sizes


def bert(s: Sizes, **own: Any) -> Made:
    shared = {
        **common(s, layer_norm_eps=1e-3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        "hidden_act": "gelu",
    }
    unknown = ("rms_norm_eps", "rope_parameters", "num_key_value_heads")
    return hf.BertConfig(**{k: v for k, v in shared.items() if k not in unknown} | own), hf.BertForPreTraining


def roberta(s: Sizes, **own: Any) -> Made:
    """Positions are counted from the padding token's number, plus one."""
    config, _ = bert(s)
    shared = {k: v for k, v in config.to_diff_dict().items() if k not in ("model_type", "transformers_version")}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return hf.RobertaConfig(**shared | {"type_vocab_size": 1} | ids | own), hf.RobertaForMaskedLM


def modernbert(s: Sizes, **own: Any) -> Made:
    """Every third layer is global, the others see half the window to each side; two rotary bases."""
    config = hf.ModernBertConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        intermediate_size=s.hidden,
        num_hidden_layers=s.layers + 3,
        num_attention_heads=s.heads,
        max_position_embeddings=s.context,
        norm_eps=1e-3,
        local_attention=s.window // 2 * 2,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        **{"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2} | own,
    )
    return config, hf.ModernBertForMaskedLM


def modernbert_mean(s: Sizes) -> Made:
    """Classifies from the mean of the real tokens, with biases everywhere."""
    biases = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}
    return modernbert(s, classifier_pooling="mean", num_labels=5, **biases)


def head(make: Callable[..., Made], model: type[hf.PreTrainedModel], labels: int = 5) -> Callable[[Sizes], Made]:
    """A smaller model of the family with a task head in place of its own."""

    def made(s: Sizes) -> Made:
        config, _ = make(replace(s, layers=s.layers - 1))
        config.num_labels = labels
        return config, model

    return made


MODELS = {"bert": bert, "roberta": roberta, "modernbert": modernbert}
TASKS = {
    "llama_sequence": head(llama, hf.LlamaForSequenceClassification),
    "llama_token": head(llama, hf.LlamaForTokenClassification),
    "llama_span": head(llama, hf.LlamaForQuestionAnswering, 2),
    "bert_sequence": head(bert, hf.BertForSequenceClassification),
    "bert_token": head(bert, hf.BertForTokenClassification),
    "bert_span": head(bert, hf.BertForQuestionAnswering, 2),
    "roberta_sequence": head(roberta, hf.RobertaForSequenceClassification),
    "roberta_token": head(roberta, hf.RobertaForTokenClassification),
    "roberta_span": head(roberta, hf.RobertaForQuestionAnswering, 2),
    "modernbert_sequence": head(modernbert, hf.ModernBertForSequenceClassification),
    "modernbert_mean": head(modernbert_mean, hf.ModernBertForSequenceClassification),
    "modernbert_token": head(modernbert, hf.ModernBertForTokenClassification),
    "modernbert_span": head(modernbert, hf.ModernBertForQuestionAnswering, 2),
}
