"""Makes gpt2.npz and llama.npz, the reference outputs of tiny random models, with PyTorch and transformers.

    pip install "lmx[parity]" && python tests/golden/make.py

Each file holds ``config`` (the content of config.json), ``tensor:NAME`` for every tensor of the checkpoint,
``tokens`` [batch, length], ``logits`` [batch, length, vocab], the mean next-token ``loss``, and for some tensors
``gradient:NAME``; all float32. This script needs no lmx, and the tests need neither PyTorch nor transformers.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB = 203  # not a multiple of 128, nor even
MODELS = {
    "gpt2": GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=48,
            n_embd=32,
            n_layer=2,
            n_head=4,
            layer_norm_epsilon=1e-3,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
    "llama": LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            max_position_embeddings=48,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            rms_norm_eps=1e-3,
            rope_theta=500.0,
            tie_word_embeddings=False,
        )
    ),
}
GRADIENTS = {
    "gpt2": ("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "transformer.h.1.ln_2.bias"),
    "llama": (
        "lm_head.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
    ),
}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Fills every parameter, biases and scales too, so that each of them shows in the outputs."""
    for name, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        with torch.no_grad():
            parameter.copy_(float(is_scale) + 0.2 * torch.randn(parameter.shape, generator=generator))


def golden(name: str) -> dict[str, np.ndarray]:
    """The content of one file."""
    model, generator = MODELS[name].eval(), torch.Generator().manual_seed(0)
    model.config._attn_implementation = "eager"
    randomise(model, generator)
    tokens = torch.randint(0, VOCAB, (2, 24), generator=generator)
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))
    loss.backward()
    parameters = dict(model.named_parameters())
    return {
        "config": np.array(json.dumps(json.loads(model.config.to_json_string()))),
        "tokens": tokens.to(torch.int32).numpy(),
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        **{f"tensor:{n}": p.detach().numpy() for n, p in parameters.items()},
        **{f"gradient:{n}": parameters[n].grad.numpy() for n in GRADIENTS[name]},
    }


if __name__ == "__main__":
    for name in MODELS:
        path = Path(__file__).with_name(f"{name}.npz")
        np.savez_compressed(path, **golden(name))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
