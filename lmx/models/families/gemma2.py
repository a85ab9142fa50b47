"""Gemma 2 (Gemma Team 2024): Gemma with norms on both sides, soft caps, and windows in every second layer."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lmx.kernels.masks import Causal, SlidingWindow
from lmx.models.config_map import ConfigMap, Reader, decoder_tasks
from lmx.models.families.gemma import CONFIG as GEMMA
from lmx.models.families.gemma import Gemma
from lmx.models.families.llama import BLOCK
from lmx.models.families.llama import NAMES as LLAMA
from lmx.models.layer_types import is_global, layer_types, read_period
from lmx.models.names import NameMap, vector
from lmx.nn.attention import SelfAttention
from lmx.nn.head import Head
from lmx.nn.sublayer import Sublayer

NAMES = replace(
    LLAMA,
    stored={
        **LLAMA.stored,
        "layer/attention_norm_out/scale": vector(BLOCK + "post_attention_layernorm.weight"),
        "layer/mlp_norm_in/scale": vector(BLOCK + "pre_feedforward_layernorm.weight"),
        "layer/mlp_norm_out/scale": vector(BLOCK + "post_feedforward_layernorm.weight"),
    },
)
CONFIG = replace(
    GEMMA,
    keys={**GEMMA.keys, "window": "sliding_window", "query_scalar": "query_pre_attn_scalar"},
    defaults={**GEMMA.defaults, "kv_heads": 4, "window": 4096, "query_scalar": 256},
    architectures=decoder_tasks("Gemma2", "question_answering"),
    ignored=("cache_implementation", "sliding_window_size"),
)


@dataclass(frozen=True)
class Gemma2(Gemma):
    """The sizes of a Gemma 2; the defaults are the 9B model."""

    layers: int = 42
    """Blocks."""
    width: int = 3584
    """Width of the residual stream."""
    kv_heads: int = 8
    """Key and value heads: as many as query heads (MHA), fewer (GQA) or one (MQA)."""
    hidden: int = 14_336
    """Hidden units of the feed-forward layer."""
    window: int = 4096
    """Positions that a local layer sees, a token's own among them."""
    period: int = 2
    """Each layer whose number, from 1, this divides is global, the others are local; 0: all are local."""
    query_scalar: int = 256
    """Scores are divided by its root."""
    attention_softcap: float | None = 50.0
    """Bounds the attention scores smoothly."""
    logit_softcap: float | None = 30.0
    """Bounds the logits smoothly."""

    family: ClassVar[str] = "gemma2"
    names: ClassVar[NameMap] = NAMES
    config_map: ClassVar[ConfigMap] = CONFIG

    def head(self, *, tied: bool, **options: Any) -> Head | None:
        """The head, with its soft cap."""
        return super().head(tied=tied, softcap=self.logit_softcap, **options)

    def attention(self, layer: int, **more: Any) -> SelfAttention:
        """A layer's attention."""
        options: dict[str, Any] = {
            "mask": Causal() if is_global(layer, self.period) else SlidingWindow(self.window),
            "scale": self.query_scalar**-0.5,
            "softcap": self.attention_softcap,
            "norm_out": self.norm(),
        }
        return super().attention(layer, **options | more)

    def feed_forward(self, layer: int) -> Sublayer:
        """GEGLU, with a norm on its output."""
        return replace(super().feed_forward(layer), norm_out=self.norm())

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """What alternates, and the soft caps: null is none, and no key transformers' own."""
        return {
            **super().read_more(config),
            "period": read_period(config, cls.period),
            "attention_softcap": config.get("attn_logit_softcapping", cls.attention_softcap),
            "logit_softcap": config.get("final_logit_softcapping", cls.logit_softcap),
        }

    def write_more(self) -> dict[str, Any]:
        """The entries for those."""
        return {
            **super().write_more(),
            "layer_types": layer_types(self.layers, self.period),
            "attn_logit_softcapping": self.attention_softcap,
            "final_logit_softcapping": self.logit_softcap,
        }


PRESETS = {
    "gemma2_2b": Gemma2(layers=26, width=2304, heads=8, kv_heads=4, hidden=9216),
    "gemma2_9b": Gemma2(),
    "gemma2_27b": Gemma2(layers=46, width=4608, heads=32, kv_heads=16, head_dim=128, hidden=36_864, query_scalar=144),
}
"""The report's table 1."""
