"""Tiny configurations of the decoder-only families, each so small that its peculiarities show within a sequence."""

from typing import Any

import transformers as hf
from sizes import Sizes

Made = tuple[hf.PreTrainedConfig, type[hf.PreTrainedModel]]


def common(s: Sizes, **own: Any) -> dict[str, Any]:
    """What the descendants of Llama name alike."""
    shared: dict[str, Any] = {
        "vocab_size": s.vocab,
        "max_position_embeddings": s.context,
        "hidden_size": s.width,
        "intermediate_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return shared | own


def gpt2(s: Sizes) -> Made:
    config = hf.GPT2Config(
        vocab_size=s.vocab,
        n_positions=s.context,
        n_embd=s.width,
        n_layer=s.layers,
        n_head=s.heads,
        layer_norm_epsilon=1e-3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return config, hf.GPT2LMHeadModel


def llama(s: Sizes, **own: Any) -> Made:
    return hf.LlamaConfig(**common(s, head_dim=s.head_dim) | own), hf.LlamaForCausalLM


def llama_llama3(s: Sizes) -> Made:
    """Rope scaling of Llama 3.1: of the rotary wavelengths, some are kept, some divided and some in between."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": s.length // 2,
    }
    return llama(s, rope_parameters=rope, tie_word_embeddings=True)


def llama_linear(s: Sizes) -> Made:
    return llama(s, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0})


def mistral(s: Sizes) -> Made:
    return hf.MistralConfig(**common(s, head_dim=s.head_dim, sliding_window=s.window)), hf.MistralForCausalLM


def mixtral(s: Sizes) -> Made:
    moe = {"num_local_experts": s.experts, "num_experts_per_tok": 2, "sliding_window": None}
    return hf.MixtralConfig(**common(s, **moe)), hf.MixtralForCausalLM


def qwen2(s: Sizes, **own: Any) -> Made:
    return hf.Qwen2Config(**common(s, tie_word_embeddings=True) | own), hf.Qwen2ForCausalLM


def qwen2_window(s: Sizes) -> Made:
    """The first layers see everything, the later ones a window."""
    window = {"use_sliding_window": True, "sliding_window": s.window, "max_window_layers": s.layers - 1}
    return qwen2(s, num_hidden_layers=s.layers + 1, tie_word_embeddings=False, **window)


def qwen3(s: Sizes) -> Made:
    return hf.Qwen3Config(**common(s, head_dim=s.head_dim)), hf.Qwen3ForCausalLM


def qwen3_moe(s: Sizes, **own: Any) -> Made:
    moe = {
        "head_dim": s.head_dim,
        "num_experts": s.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": s.hidden // 2,
        "norm_topk_prob": True,
    }
    return hf.Qwen3MoeConfig(**common(s, **moe) | own), hf.Qwen3MoeForCausalLM


def qwen3_moe_mixed(s: Sizes) -> Made:
    """Every second layer is a mixture, but for one listed as dense; weights of the experts do not sum to one."""
    return qwen3_moe(
        s, norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[3], num_hidden_layers=s.layers + 3
    )


def gemma(s: Sizes) -> Made:
    config = hf.GemmaConfig(**common(s, head_dim=s.head_dim, num_key_value_heads=1, tie_word_embeddings=True))
    return config, hf.GemmaForCausalLM


def gemma2(s: Sizes) -> Made:
    """Local and global layers alternate, in an odd number; soft caps bite."""
    own = {
        "num_hidden_layers": 2 * s.layers - 1,
        "head_dim": s.head_dim,
        "query_pre_attn_scalar": 10,
        "sliding_window": s.window,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    }
    return hf.Gemma2Config(**common(s, **own)), hf.Gemma2ForCausalLM


def gemma3_text(s: Sizes) -> Made:
    """Five local layers, one global layer, and a remainder of local ones."""
    own = {
        "num_hidden_layers": s.layers + 6,
        "head_dim": s.head_dim,
        "query_pre_attn_scalar": 40,  # with sharper attention float32 itself is 1e-4 from float64
        "sliding_window": s.window,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        "tie_word_embeddings": True,
    }
    return hf.Gemma3TextConfig(**common(s, **own)), hf.Gemma3ForCausalLM


def phi3(s: Sizes, **own: Any) -> Made:
    return hf.Phi3Config(**common(s, sliding_window=s.window) | own), hf.Phi3ForCausalLM


def phi3_longrope(s: Sizes, original: int) -> Made:
    """Sequences up to the original context turn with the short factors, longer ones with the long factors."""
    pairs = s.width // s.heads // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.7 * i for i in range(pairs)],
        "original_max_position_embeddings": original,
    }
    return phi3(s, rope_parameters=rope, original_max_position_embeddings=original, sliding_window=None)


def olmo2(s: Sizes) -> Made:
    return hf.Olmo2Config(**common(s)), hf.Olmo2ForCausalLM


def deepseek_v3(s: Sizes, **own: Any) -> Made:
    """Latent attention with a query rank, yarn, one dense layer, then mixtures routed by groups."""
    shape = {
        "num_hidden_layers": s.layers + 1,
        "num_key_value_heads": s.heads,
        "q_lora_rank": s.width // 2,
        "kv_lora_rank": s.width // 2 - 2,
        "qk_nope_head_dim": s.head_dim - 2,
        "qk_rope_head_dim": 12,
        "v_head_dim": s.head_dim - 4,
        "first_k_dense_replace": 1,
        "n_shared_experts": 2,
        "n_routed_experts": 2 * s.experts,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": s.hidden // 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }
    rope = yarn(s, mscale=0.7, mscale_all_dim=0.9)
    return hf.DeepseekV3Config(**common(s, rope_parameters=rope, **shape) | own), hf.DeepseekV3ForCausalLM


def deepseek_v3_direct(s: Sizes) -> Made:
    """Queries without a latent, plain rotary positions, one group, weights that do not sum to one."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    return deepseek_v3(s, q_lora_rank=None, rope_parameters=rope, n_group=1, topk_group=1, norm_topk_prob=False)


def gpt_oss(s: Sizes) -> Made:
    """Sinks, alternating windows, biases everywhere, SwiGLU clamped where these models reach."""
    own = {
        "head_dim": s.head_dim,
        "num_hidden_layers": s.layers + 1,
        "num_local_experts": s.experts,
        "num_experts_per_tok": 2,
        "sliding_window": s.window,
        "swiglu_limit": 0.8,
        "rope_parameters": yarn(s, truncate=False),
    }
    return hf.GptOssConfig(**common(s, **own)), hf.GptOssForCausalLM


def yarn(s: Sizes, **own: Any) -> dict[str, Any]:
    """Of the rotary wavelengths, the shortest are kept, the longest divided and the others in between."""
    numbers = {"rope_theta": 20.0, "factor": 4.0, "beta_fast": 0.6, "beta_slow": 0.1}
    return {"rope_type": "yarn", "original_max_position_embeddings": s.length // 2} | numbers | own


MODELS = {
    "gpt2": gpt2,
    "gpt2_padded": gpt2,
    "llama": llama,
    "llama_llama3": llama_llama3,
    "llama_linear": llama_linear,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen2_window": qwen2_window,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "qwen3_moe_mixed": qwen3_moe_mixed,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "phi3": phi3,
    "phi3_longrope_short": lambda s: phi3_longrope(s, original=s.length),
    "phi3_longrope_long": lambda s: phi3_longrope(s, original=s.length // 2),
    "olmo2": olmo2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v3_direct": deepseek_v3_direct,
    "gpt_oss": gpt_oss,
}
