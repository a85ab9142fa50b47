"""Llama (Touvron et al. 2023; Dubey et al. 2024): pre-RMSNorm, rotary positions, grouped queries, SwiGLU."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lmx.errors import UserError
from lmx.models.config import ModelConfig
from lmx.models.config_map import ConfigMap, Reader, decoder_tasks
from lmx.models.names import NameMap, linear, table, vector
from lmx.models.rope import read_rope, write_rope
from lmx.models.specs import BlockSpec, ModelSpec, StackSpec, padded
from lmx.nn.activation import Glu
from lmx.nn.attention import SelfAttention
from lmx.nn.embedding import Embedding
from lmx.nn.mlp import Mlp
from lmx.nn.norm import Norm, RmsNorm
from lmx.nn.position import Llama3Scaling, Rope
from lmx.nn.sublayer import Sublayer

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
        "tasks/classes/out/kernel": linear("score.weight"),
        "tasks/classes/out/bias": vector("score.bias"),
        "tasks/span/out/kernel": linear("qa_outputs.weight"),
        "tasks/span/out/bias": vector("qa_outputs.bias"),
    },
    ignored=("*rotary_emb.inv_freq", "lm_head.weight"),
    base="model.",
    bases={"question_answering": "transformer.", "embedding": ""},
)


CONFIG = ConfigMap(
    keys={
        "vocab": "vocab_size",
        "context": "max_position_embeddings",
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "hidden": "intermediate_size",
        "tied": "tie_word_embeddings",
        "eps": "rms_norm_eps",
    },
    defaults={"tied": False, "eps": 1e-6},
    only={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    architectures=decoder_tasks("Llama"),
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
    rope: Rope = Rope(500_000.0)
    """Rotary positions: the base of their wavelengths, and how they are scaled beyond the first context."""
    tied: bool = False
    """Whether the output table is the embedding table."""
    eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    family: ClassVar[str] = "llama"
    names: ClassVar[NameMap] = NAMES
    config_map: ClassVar[ConfigMap] = CONFIG
    default_theta: ClassVar[float] = 10_000.0
    """The base of the rotary wavelengths where ``config.json`` gives none."""

    def spec(self) -> ModelSpec:
        """The model's shape. Raises UserError if the key heads do not divide the query heads."""
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads {self.heads} is not divisible by model.kv_heads {self.kv_heads}")
        return ModelSpec(
            vocab=self.vocab,
            width=self.width,
            context=self.context,
            embedding=self.embedding(),
            stack=StackSpec.of(self.block(layer) for layer in range(self.layers)),
            final_norm=self.norm(),
            head=self.head(tied=self.tied),
            tasks=self.task_heads(),
        )

    def embedding(self) -> Embedding:
        """The input's end."""
        return Embedding(padded(self.vocab))

    def norm(self) -> Norm:
        """The norm before each sublayer and at the end."""
        return RmsNorm(eps=self.eps)

    def block(self, layer: int) -> BlockSpec:
        """The block of a layer, counted from 0: where families of alternating layers differ."""
        return BlockSpec((self.attention(layer), self.feed_forward(layer)))

    def attention(self, layer: int, **more: Any) -> SelfAttention:
        """A layer's attention; ``more`` are fields of it in which a family differs."""
        options: dict[str, Any] = {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rope": self.rope,
            "norm_in": self.norm(),
        }
        return SelfAttention(**options | more)

    def feed_forward(self, layer: int) -> Sublayer:
        """A layer's feed-forward part: dense here, experts elsewhere."""
        return Mlp(hidden=self.hidden, activation=Glu("silu"), norm_in=self.norm())

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """Heads, where they may be left out, and rotary positions."""
        heads = config.value("num_attention_heads")
        head_dim = config.value("head_dim", config.value("hidden_size") // heads)
        return {
            "kv_heads": config.value("num_key_value_heads", heads),
            "head_dim": head_dim,
            "rope": read_rope(config, head_dim=head_dim, theta=cls.default_theta),
        }

    def write_more(self) -> dict[str, Any]:
        """The entries for those."""
        heads = {"num_key_value_heads": self.kv_heads, "head_dim": self.head_dim}
        return heads | write_rope(self.rope, head_dim=self.head_dim, context=self.context)


def _stretched(factor: float) -> Rope:
    """The rotary positions of Llama 3.1 and 3.2."""
    return Rope(500_000.0, scaling=Llama3Scaling(factor, 1.0, 4.0, original_context=8192))


LLAMA_2 = Llama(vocab=32000, context=4096, kv_heads=32, hidden=11008, rope=Rope(10_000.0))
LLAMA_3 = Llama()
LLAMA_3_2 = Llama(context=131072, hidden=8192, rope=_stretched(32.0), tied=True)
PRESETS = {
    "llama_2_7b": LLAMA_2,
    "llama_2_13b": replace(LLAMA_2, layers=40, width=5120, heads=40, kv_heads=40, hidden=13824),
    "llama_2_70b": replace(LLAMA_2, layers=80, width=8192, heads=64, kv_heads=8, hidden=28672),
    "llama_3_8b": LLAMA_3,
    "llama_3_70b": replace(LLAMA_3, layers=80, width=8192, heads=64, hidden=28672),
    "llama_3_1_405b": Llama(context=131072, layers=126, width=16384, heads=128, hidden=53248, rope=_stretched(8.0)),
    "llama_3_2_1b": replace(LLAMA_3_2, layers=16, width=2048, head_dim=64),
    "llama_3_2_3b": replace(LLAMA_3_2, layers=28, width=3072, heads=24),
}
"""Published sizes."""
