"""Qwen2 and Qwen2.5 (Yang et al. 2024): a Llama with biases on queries, keys and values, maybe with windows."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from lmx.errors import UserError
from lmx.kernels.masks import Causal, Mask
from lmx.models.config_map import ConfigMap, Reader, decoder_tasks
from lmx.models.families.llama import BLOCK, CONFIG, NAMES
from lmx.models.families.mistral import Mistral
from lmx.models.layer_types import GLOBAL, LOCAL, local_layers
from lmx.models.names import NameMap, vector
from lmx.nn.attention import SelfAttention
from lmx.nn.position import Rope

BIASES = {
    f"layer/attention/{name}/bias": vector(f"{BLOCK}self_attn.{name[0]}_proj.bias")
    for name in ("query", "key", "value")
}


@dataclass(frozen=True)
class Qwen2(Mistral):
    """The sizes of a Qwen2; the defaults are the 7B model of Qwen2.5."""

    vocab: int = 152064
    layers: int = 28
    width: int = 3584
    heads: int = 28
    kv_heads: int = 4
    hidden: int = 18944
    rope: Rope = Rope(1e6)
    eps: float = 1e-6
    window: int | None = None
    sliding: tuple[int, ...] = ()
    """The layers, counted from 0, whose positions see the window only."""

    family: ClassVar[str] = "qwen2"
    names: ClassVar[NameMap] = dataclasses.replace(NAMES, stored={**NAMES.stored, **BIASES})
    config_map: ClassVar[ConfigMap] = dataclasses.replace(
        CONFIG, only={"hidden_act": "silu"}, architectures=decoder_tasks("Qwen2")
    )

    def mask(self, layer: int) -> Mask:
        """The window in some layers."""
        return super().mask(layer) if layer in self.sliding else Causal()

    def attention(self, layer: int, **more: Any) -> SelfAttention:
        """With biases, but on the output."""
        return super().attention(layer, **{"bias": True} | more)

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """And the window's layers: listed, or in older files all from one on."""
        window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
        first = config.value("max_window_layers", 28)
        sliding = local_layers(config, lambda layer: window is not None and layer >= first)
        if sliding and window is None:
            raise UserError(f"config.json lists {LOCAL} in layer_types, but sets use_sliding_window to false")
        return super().read_more(config) | {"window": window, "sliding": sliding}

    def write_more(self) -> dict[str, Any]:
        """The entries for those, in both forms."""
        local = [layer in self.sliding for layer in range(self.layers)]
        return super().write_more() | {
            "use_sliding_window": self.window is not None,
            "max_window_layers": [*local, True].index(True),
            "layer_types": [LOCAL if it else GLOBAL for it in local],
        }


SMALL = Qwen2(vocab=151936, layers=24, width=896, heads=14, kv_heads=2, head_dim=64, hidden=4864, tied=True)
LARGE = Qwen2(layers=48, width=5120, heads=40, kv_heads=8, hidden=13824)
PRESETS = {
    "qwen2_5_0_5b": SMALL,
    "qwen2_5_1_5b": dataclasses.replace(SMALL, layers=28, width=1536, heads=12, head_dim=128, hidden=8960),
    "qwen2_5_3b": dataclasses.replace(SMALL, layers=36, width=2048, heads=16, head_dim=128, hidden=11008),
    "qwen2_5_7b": Qwen2(),
    "qwen2_5_14b": LARGE,
    "qwen2_5_32b": dataclasses.replace(LARGE, layers=64, hidden=27648),
    "qwen2_5_72b": dataclasses.replace(LARGE, layers=80, width=8192, heads=64, hidden=29568),
}
"""Published sizes."""
