"""Gemma (Gemma Team 2024): Llama with GEGLU, RMSNorm scales around zero, scaled embeddings and a tied output table."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lmx.models.config_map import ConfigMap, Reader, decoder_tasks
from lmx.models.families.llama import CONFIG as LLAMA
from lmx.models.families.llama import Llama
from lmx.models.layer_types import GLOBAL
from lmx.models.rope import read_rope
from lmx.models.specs import padded
from lmx.nn.activation import Glu
from lmx.nn.embedding import Embedding
from lmx.nn.mlp import Mlp
from lmx.nn.norm import RmsNorm
from lmx.nn.position import Rope
from lmx.nn.sublayer import Sublayer

ACTIVATION = "gelu_pytorch_tanh"
CONFIG = replace(
    LLAMA,
    keys={**LLAMA.keys, "kv_heads": "num_key_value_heads", "head_dim": "head_dim"},
    defaults={"tied": True, "eps": 1e-6, "kv_heads": 16, "head_dim": 256},
    only={"hidden_activation": ACTIVATION, "attention_bias": False, "use_bidirectional_attention": False},
    architectures=decoder_tasks("Gemma", "question_answering"),
)


@dataclass(frozen=True)
class Gemma(Llama):
    """The sizes of a Gemma; the defaults are the 7B model."""

    vocab: int = 256_000
    """Tokens of the vocabulary; at least the tokenizer's."""
    layers: int = 28
    """Blocks."""
    width: int = 3072
    """Width of the residual stream."""
    heads: int = 16
    """Query heads."""
    kv_heads: int = 16
    """Key and value heads: as many as query heads (MHA), fewer (GQA) or one (MQA)."""
    head_dim: int = 256
    """Width of a head."""
    hidden: int = 24_576
    """Hidden units of the feed-forward layer."""
    rope: Rope = Rope(10_000.0)
    """Rotary positions: the base of their wavelengths, and how they are scaled beyond the first context."""
    tied: bool = True
    """Whether the output table is the embedding table."""
    eps: float = 1e-6
    """Added to the mean square in RMSNorm."""

    family: ClassVar[str] = "gemma"
    config_map: ClassVar[ConfigMap] = CONFIG

    def embedding(self) -> Embedding:
        """The input's end: embeddings times the root of their width."""
        return Embedding(padded(self.vocab), scale=math.sqrt(self.width))

    def norm(self) -> RmsNorm:
        """The norm before each sublayer and at the end."""
        return RmsNorm(eps=self.eps, offset=1.0)

    def feed_forward(self, layer: int) -> Sublayer:
        """GEGLU."""
        return Mlp(hidden=self.hidden, activation=Glu("gelu_tanh"), norm_in=self.norm())

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """Rotary positions. Early files call the activation ``gelu`` and mean its approximation."""
        if config.get("hidden_act") != "gelu":
            config.only("hidden_act", ACTIVATION)
        head_dim = cls.config_map.read(config)["head_dim"]
        return {"rope": read_rope(config, head_dim=head_dim, layer_type=GLOBAL, theta=cls.rope.theta)}

    def write_more(self) -> dict[str, Any]:
        """The entries for those."""
        return {"hidden_act": ACTIVATION, **super().write_more()}


PRESETS = {"gemma_2b": Gemma(layers=18, width=2048, heads=8, kv_heads=1, hidden=16_384), "gemma_7b": Gemma()}
"""The report's table 1."""
