"""GPT-2 (Radford et al. 2019): pre-norm, learned positions, biases, GELU (tanh form), tied output table."""

import math
from dataclasses import dataclass
from typing import ClassVar

from lmx.errors import UserError
from lmx.models.config import ModelConfig
from lmx.models.specs import BlockSpec, ModelSpec, Segment, StackSpec, padded
from lmx.nn.attention import SelfAttention
from lmx.nn.embedding import Embedding
from lmx.nn.mlp import Mlp
from lmx.nn.norm import LayerNorm


@dataclass(frozen=True)
class Gpt2(ModelConfig):
    """The sizes of a GPT-2; the defaults are the 124M model."""

    layers: int = 12
    """Blocks."""
    width: int = 768
    """Width of the residual stream."""
    heads: int = 12
    """Attention heads."""
    dropout: float = 0.0
    """Dropout on embeddings, attention probabilities and sublayer outputs (the paper's models: 0.1)."""

    family: ClassVar[str] = "gpt2"

    def spec(self) -> ModelSpec:
        """The model's shape. Raises UserError if the heads do not divide the width."""
        if self.width % self.heads:
            raise UserError(f"model.width {self.width} is not divisible by model.heads {self.heads}")
        common = {
            "norm_in": LayerNorm(eps=1e-5),
            "dropout": self.dropout,
            "std": 0.02,
            "out_std": 0.02 / math.sqrt(2 * self.layers),
        }
        attention = SelfAttention(
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            bias=True,
            attention_dropout=self.dropout,
            **common,
        )
        mlp = Mlp(hidden=4 * self.width, activation="gelu_tanh", bias=True, **common)
        return ModelSpec(
            vocab=self.vocab,
            width=self.width,
            context=self.context,
            embedding=Embedding(padded(self.vocab), positions=self.context, dropout=self.dropout),
            stack=StackSpec((Segment((BlockSpec((attention, mlp)),), self.layers),)),
            final_norm=LayerNorm(eps=1e-5),
            head=None,
        )
