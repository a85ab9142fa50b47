"""Llama (Touvron et al. 2023; Dubey et al. 2024): pre-RMSNorm, rotary positions, grouped queries, SwiGLU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lmx.errors import UserError
from lmx.models.config import ModelConfig
from lmx.models.names import NameMap, linear, only, required, table, vector
from lmx.models.specs import BlockSpec, ModelSpec, Segment, StackSpec, padded
from lmx.nn.attention import SelfAttention
from lmx.nn.embedding import Embedding, Head
from lmx.nn.mlp import Mlp
from lmx.nn.norm import RmsNorm
from lmx.nn.position import Rope

BLOCK = "model.layers.{layer}."
NAMES = NameMap(
    {
        "embedding/table": table("model.embed_tokens.weight"),
        "layer/attention_norm_in/scale": vector(BLOCK + "input_layernorm.weight"),
        "layer/attention/query/kernel": linear(BLOCK + "self_attn.q_proj.weight"),
        "layer/attention/key/kernel": linear(BLOCK + "self_attn.k_proj.weight"),
        "layer/attention/value/kernel": linear(BLOCK + "self_attn.v_proj.weight"),
        "layer/attention/out/kernel": linear(BLOCK + "self_attn.o_proj.weight", inputs=2),
        "layer/mlp_norm_in/scale": vector(BLOCK + "post_attention_layernorm.weight"),
        "layer/mlp/gate/kernel": linear(BLOCK + "mlp.gate_proj.weight"),
        "layer/mlp/up/kernel": linear(BLOCK + "mlp.up_proj.weight"),
        "layer/mlp/down/kernel": linear(BLOCK + "mlp.down_proj.weight"),
        "final_norm/scale": vector("model.norm.weight"),
        "head/table": table("lm_head.weight"),
    },
    ignored=("*.rotary_emb.inv_freq", "lm_head.weight"),
)


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
    names: ClassVar[NameMap] = NAMES

    def spec(self) -> ModelSpec:
        """The model's shape. Raises UserError if the key heads do not divide the query heads."""
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads {self.heads} is not divisible by model.kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim {self.head_dim} is odd; rotary positions turn pairs: make it even")
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

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Self:
        """The sizes in a ``config.json``; those that it may leave out are transformers' defaults."""
        only(config, hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None)
        rope = config.get("rope_parameters") or config  # transformers 5 nests the rotary numbers
        only(rope, rope_type="default")
        width, heads = required(config, "hidden_size"), required(config, "num_attention_heads")
        return cls(
            vocab=required(config, "vocab_size"),
            context=required(config, "max_position_embeddings"),
            layers=required(config, "num_hidden_layers"),
            width=width,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or width // heads,
            hidden=required(config, "intermediate_size"),
            rope_theta=float(rope.get("rope_theta", 10_000.0)),
            tied=config.get("tie_word_embeddings", False),
            eps=config.get("rms_norm_eps", 1e-6),
        )
