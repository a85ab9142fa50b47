"""Qwen3 (Yang et al. 2025): a Qwen2 with a norm on each head's queries and keys in place of biases."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from lmx.models.config_map import ConfigMap, Reader, decoder_tasks
from lmx.models.families.llama import BLOCK, CONFIG, NAMES
from lmx.models.families.qwen2 import Qwen2
from lmx.models.names import NameMap, vector
from lmx.nn.attention import SelfAttention

QK_NORMS = {
    "layer/attention/query_norm/scale": vector(BLOCK + "self_attn.q_norm.weight"),
    "layer/attention/key_norm/scale": vector(BLOCK + "self_attn.k_norm.weight"),
}


@dataclass(frozen=True)
class Qwen3(Qwen2):
    """The sizes of a Qwen3; the defaults are the 8B model."""

    vocab: int = 151936
    context: int = 40960
    layers: int = 36
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 12288

    family: ClassVar[str] = "qwen3"
    names: ClassVar[NameMap] = dataclasses.replace(NAMES, stored={**NAMES.stored, **QK_NORMS})
    config_map: ClassVar[ConfigMap] = dataclasses.replace(
        CONFIG, only={"hidden_act": "silu", "attention_bias": False}, architectures=decoder_tasks("Qwen3")
    )

    def attention(self, layer: int, **more: Any) -> SelfAttention:
        """With norms, without biases."""
        return super().attention(layer, bias=False, qk_norm=self.norm(), **more)

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """With a head's width of its own where the file gives none."""
        return super().read_more(config) | {"head_dim": config.value("head_dim", 128)}


SMALL = Qwen3(layers=28, width=1024, heads=16, hidden=3072, tied=True)
PRESETS = {
    "qwen3_0_6b": SMALL,
    "qwen3_1_7b": dataclasses.replace(SMALL, width=2048, hidden=6144),
    "qwen3_4b": Qwen3(width=2560, hidden=9728, tied=True),
    "qwen3_8b": Qwen3(),
    "qwen3_14b": Qwen3(layers=40, width=5120, heads=40, hidden=17408),
    "qwen3_32b": Qwen3(layers=64, width=5120, heads=64, hidden=25600),
}
"""Published sizes."""
