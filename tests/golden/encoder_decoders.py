"""Tiny configurations of the encoder-decoder families."""

from typing import Any

import transformers as hf
from decoders import Made
from encoders import head
from sizes import Sizes


def t5(s: Sizes, **own: Any) -> Made:
    """Few buckets of relative positions, the last of them for distances that the sequences reach."""
    config = hf.T5Config(
        **{
            "vocab_size": s.vocab,
            "d_model": s.width,
            "d_kv": s.head_dim,
            "d_ff": s.hidden,
            "num_layers": s.layers,
            "num_decoder_layers": s.layers + 1,
            "num_heads": s.heads,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": s.length // 2,
            "dropout_rate": 0.0,
            "layer_norm_epsilon": 1e-3,
            "decoder_start_token_id": 0,
        }
        | own
    )
    return config, hf.T5ForConditionalGeneration


def t5_v1_1(s: Sizes) -> Made:
    """Gated GELU, and an output table of its own, which is why the hidden states are not scaled."""
    return t5(s, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def bart(s: Sizes, **own: Any) -> Made:
    return hf.BartConfig(**_stacks(s, pad_token_id=1, decoder_start_token_id=2) | own), hf.BartForConditionalGeneration


def marian(s: Sizes) -> Made:
    """Sinusoidal positions, all sines before all cosines."""
    last = s.vocab - 1
    own = {"scale_embedding": True, "activation_function": "swish", "eos_token_id": 0, "forced_eos_token_id": 0}
    return hf.MarianConfig(**_stacks(s, pad_token_id=last, decoder_start_token_id=last, **own)), hf.MarianMTModel


def _stacks(s: Sizes, **own: Any) -> dict[str, Any]:
    return {
        "vocab_size": s.vocab,
        "d_model": s.width,
        "max_position_embeddings": s.context,
        "encoder_layers": s.layers,
        "decoder_layers": s.layers + 1,
        "encoder_attention_heads": s.heads,
        "decoder_attention_heads": s.heads,
        "encoder_ffn_dim": s.hidden,
        "decoder_ffn_dim": s.hidden + 4,
        "dropout": 0.0,
    } | own


MODELS = {"t5": t5, "t5_v1_1": t5_v1_1, "bart": bart, "marian": marian}
TASKS = {"bart_sequence": head(bart, hf.BartForSequenceClassification)}
