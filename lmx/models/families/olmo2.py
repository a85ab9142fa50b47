"""OLMo-2 (OLMo Team 2025): a Llama whose norms come after the sublayers, and over all heads' queries and keys."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from lmx.models.config_map import ConfigMap, decoder_tasks
from lmx.models.families.llama import BLOCK, CONFIG, NAMES, Llama
from lmx.models.families.qwen3 import QK_NORMS
from lmx.models.names import NameMap, vector
from lmx.nn.attention import SelfAttention
from lmx.nn.sublayer import Sublayer

NORMS = {
    "layer/attention_norm_out/scale": vector(BLOCK + "post_attention_layernorm.weight"),
    "layer/mlp_norm_out/scale": vector(BLOCK + "post_feedforward_layernorm.weight"),
}


@dataclass(frozen=True)
class Olmo2(Llama):
    """The sizes of an OLMo-2; the defaults are the 7B model."""

    vocab: int = 100352
    context: int = 4096
    kv_heads: int = 32
    hidden: int = 11008
    eps: float = 1e-6

    family: ClassVar[str] = "olmo2"
    names: ClassVar[NameMap] = dataclasses.replace(NAMES, stored={**NAMES.stored, **NORMS, **QK_NORMS})
    config_map: ClassVar[ConfigMap] = dataclasses.replace(
        CONFIG,
        defaults={"tied": False, "eps": 1e-5},
        only={"hidden_act": "silu", "attention_bias": False},
        architectures=decoder_tasks("Olmo2", "token_classification", "question_answering"),
    )

    def attention(self, layer: int, **more: Any) -> SelfAttention:
        """With those norms."""
        norms = {"norm_in": None, "norm_out": self.norm(), "qk_norm": self.norm(), "qk_norm_over": "heads"}
        return super().attention(layer, **norms | more)

    def feed_forward(self, layer: int) -> Sublayer:
        """With that norm."""
        return dataclasses.replace(super().feed_forward(layer), norm_in=None, norm_out=self.norm())


PRESETS = {
    "olmo2_1b": Olmo2(layers=16, width=2048, heads=16, kv_heads=16, hidden=8192),
    "olmo2_7b": Olmo2(),
    "olmo2_13b": Olmo2(layers=40, width=5120, heads=40, kv_heads=40, hidden=13824),
    "olmo2_32b": Olmo2(layers=64, width=5120, heads=40, kv_heads=8, hidden=27648),
}
"""Published sizes."""
