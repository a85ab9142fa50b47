"""Phi-3 and Phi-4 (Abdin et al. 2024): Mistrals whose checkpoints fuse kernels; longer contexts by LongRoPE."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from lmx.models.config_map import ConfigMap, Reader, decoder_tasks
from lmx.models.families.llama import BLOCK, NAMES
from lmx.models.families.mistral import Mistral
from lmx.models.names import NameMap, linear
from lmx.nn.position import Rope

QKV, GATE_UP = linear(BLOCK + "self_attn.qkv_proj.weight"), linear(BLOCK + "mlp.gate_up_proj.weight")
FUSED = {
    **{f"layer/attention/{name}/kernel": QKV for name in ("query", "key", "value")},
    **{f"layer/mlp/{name}/kernel": GATE_UP for name in ("gate", "up")},
}


@dataclass(frozen=True)
class Phi3(Mistral):
    """The sizes of a Phi-3; the defaults are the mini model with the context of 4k."""

    vocab: int = 32064
    context: int = 4096
    width: int = 3072
    kv_heads: int = 32
    head_dim: int = 96
    hidden: int = 8192
    window: int | None = 2047

    family: ClassVar[str] = "phi3"
    names: ClassVar[NameMap] = dataclasses.replace(NAMES, stored={**NAMES.stored, **FUSED})
    config_map: ClassVar[ConfigMap] = dataclasses.replace(
        Mistral.config_map,
        defaults={"tied": False, "eps": 1e-5},
        architectures=decoder_tasks("Phi3", "question_answering"),
        ignored=("original_max_position_embeddings", "full_attn_mod", "interpolate_factor"),
    )

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """Without a window where there is no word of one."""
        return super().read_more(config) | {"window": config.get("sliding_window")}

    def write_more(self) -> dict[str, Any]:
        """With the original context, also where positions are not scaled: transformers' default is another one."""
        return {"original_max_position_embeddings": self.context} | super().write_more()


MEDIUM = Phi3(layers=40, width=5120, heads=40, kv_heads=10, head_dim=128, hidden=17920)
PRESETS = {
    "phi_3_mini_4k": Phi3(),
    "phi_3_medium_4k": MEDIUM,
    "phi_4": dataclasses.replace(MEDIUM, vocab=100352, context=16384, rope=Rope(250_000.0), window=None),
}
"""Published sizes."""
