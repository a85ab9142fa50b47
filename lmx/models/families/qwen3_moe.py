"""Qwen3-MoE (Yang et al. 2025): Qwen3's attention, with mixtures of many small experts in all layers or in most."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from lmx.models.config_map import ConfigMap, Reader, decoder_tasks
from lmx.models.families.llama import BLOCK, NAMES, Llama
from lmx.models.families.mixtral import MOE, Mixtral
from lmx.models.families.qwen3 import QK_NORMS
from lmx.models.names import NameMap, linear
from lmx.nn.attention import SelfAttention
from lmx.nn.router import Router, SoftmaxRouter
from lmx.nn.sublayer import Sublayer

EXPERTS = {
    "layer/moe_norm_in/scale": MOE["layer/moe_norm_in/scale"],
    "layer/moe/router/kernel": linear(BLOCK + "mlp.gate.weight"),
    **{
        f"layer/moe/experts/{name}/kernel": linear(f"{BLOCK}mlp.experts.{{expert}}.{name}_proj.weight")
        for name in ("gate", "up", "down")
    },
}


@dataclass(frozen=True)
class Qwen3Moe(Mixtral):
    """The sizes of a Qwen3-MoE; the defaults are 30B-A3B."""

    vocab: int = 151936
    context: int = 40960
    layers: int = 48
    width: int = 2048
    kv_heads: int = 4
    hidden: int = 6144
    eps: float = 1e-6
    experts: int = 128
    experts_per_token: int = 8
    expert_hidden: int = 768
    """Hidden units of an expert."""
    renormalise: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    dense: tuple[int, ...] = ()
    """The layers, counted from 0, that have a dense feed-forward part, of ``hidden`` units."""

    family: ClassVar[str] = "qwen3_moe"
    names: ClassVar[NameMap] = dataclasses.replace(NAMES, stored={**NAMES.stored, **QK_NORMS, **EXPERTS})
    config_map: ClassVar[ConfigMap] = dataclasses.replace(
        Mixtral.config_map,
        keys={
            **Llama.config_map.keys,
            "experts_per_token": "num_experts_per_tok",
            "expert_hidden": "moe_intermediate_size",
            "renormalise": "norm_topk_prob",
        },
        defaults={"tied": False, "eps": 1e-6, "renormalise": False},
        only={"hidden_act": "silu", "attention_bias": False},
        architectures=decoder_tasks("Qwen3Moe"),
        ignored=(*Mixtral.config_map.ignored, "max_window_layers"),
    )
    default_theta: ClassVar[float] = 10_000.0

    def attention(self, layer: int, **more: Any) -> SelfAttention:
        """With norms on queries and keys."""
        return super().attention(layer, qk_norm=self.norm(), **more)

    def router(self) -> Router:
        """A softmax, with or without the weights' division."""
        return SoftmaxRouter(self.experts_per_token, renormalise=self.renormalise)

    def feed_forward(self, layer: int) -> Sublayer:
        """A mixture, or a dense layer."""
        return Llama.feed_forward(self, layer) if layer in self.dense else self.mixture(self.expert_hidden)

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """And the experts, which transformers 5 calls otherwise, and the dense layers: listed, or not every n-th."""
        window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
        step, listed = config.value("decoder_sparse_step", 1), config.value("mlp_only_layers", [])
        layers = range(config.value("num_hidden_layers"))
        return super().read_more(config) | {
            "window": window,
            "experts": config.value("num_experts", config.value("num_local_experts", 128)),
            "dense": tuple(layer for layer in layers if layer in listed or (layer + 1) % step),
        }

    def write_more(self) -> dict[str, Any]:
        """The entries for those: all dense layers listed."""
        return super().write_more() | {
            "use_sliding_window": self.window is not None,
            "num_experts": self.experts,
            "mlp_only_layers": list(self.dense),
            "decoder_sparse_step": 1,
        }


PRESETS = {
    "qwen3_30b_a3b": Qwen3Moe(),
    "qwen3_235b_a22b": Qwen3Moe(layers=94, width=4096, heads=64, hidden=12288, expert_hidden=1536),
}
"""Published sizes."""
