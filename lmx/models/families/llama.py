"""Llama (Touvron et al. 2023; Dubey et al. 2024): pre-norm RMSNorm, rotary positions, grouped queries, SwiGLU."""

from dataclasses import dataclass
from typing import ClassVar

from lmx.errors import UserError
from lmx.models.config import ModelConfig
from lmx.models.specs import BlockSpec, ModelSpec, Segment, StackSpec, padded
from lmx.nn.attention import SelfAttention
from lmx.nn.embedding import Embedding, Head
from lmx.nn.mlp import Mlp
from lmx.nn.norm import RmsNorm
from lmx.nn.position import Rope


@dataclass(frozen=True)
class Llama(ModelConfig):
    """The sizes of a Llama; the defaults are the 8B model of Llama 3."""

    vocab: int = 128256
    """Tokens of the vocabulary; at least the tokenizer's."""
    context: int = 8192
    """The longest sequence."""
    layers: int = 32
    """Blocks."""
    width: int = 4096
    """Width of the residual stream."""
    heads: int = 32
    """Query heads."""
    kv_heads: int = 8
    """Key and value heads: as many as query heads (MHA), fewer (GQA) or one (MQA)."""
    head_dim: int = 128
    """Width of a head."""
    hidden: int = 14336
    """Hidden units of the feed-forward layer."""
    rope_theta: float = 500_000.0
    """Base of the rotary wavelengths."""
    tied: bool = False
    """Whether the output table is the embedding table."""
    eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    family: ClassVar[str] = "llama"

    def spec(self) -> ModelSpec:
        """The model's shape. Raises UserError if the key heads do not divide the query heads."""
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads {self.heads} is not divisible by model.kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim {self.head_dim} is odd; rotary positions turn pairs, choose an even one")
        norm = RmsNorm(eps=self.eps)
        attention = SelfAttention(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope=Rope(self.rope_theta),
            norm_in=norm,
        )
        mlp = Mlp(hidden=self.hidden, activation="silu", gated=True, norm_in=norm)
        rows = padded(self.vocab)
        return ModelSpec(
            vocab=self.vocab,
            width=self.width,
            context=self.context,
            embedding=Embedding(rows),
            stack=StackSpec((Segment((BlockSpec((attention, mlp)),), self.layers),)),
            final_norm=norm,
            head=None if self.tied else Head(rows),
        )
