"""The original Transformer (Vaswani et al. 2017): norms after the residual sum, sinusoidal positions, one table."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from lmx.errors import UserError
from lmx.kernels.masks import Bidirectional
from lmx.models.config import ModelConfig
from lmx.models.config_map import ConfigMap
from lmx.models.names import NameMap, Stored, conv1d, table, vector
from lmx.models.specs import BlockSpec, EncoderSpec, ModelSpec, StackSpec, padded
from lmx.nn.attention import SelfAttention
from lmx.nn.cross_attention import CrossAttention
from lmx.nn.embedding import Embedding, Sinusoidal
from lmx.nn.mlp import Mlp
from lmx.nn.norm import LayerNorm


def _stack(ours: str, theirs: str, attentions: dict[str, str]) -> dict[str, Stored]:
    """One stack; ``attentions`` maps our names of its kinds of attention to theirs."""
    block, layer = theirs + ".{layer}.", ours + "layer/"
    names: dict[str, Stored] = {}
    for sublayer, name in attentions.items():
        for part in ("query", "key", "value", "out"):
            names[f"{layer}{sublayer}/{part}/kernel"] = conv1d(f"{block}{name}.{part}", inputs=1 + (part == "out"))
    for part in ("up", "down"):
        names[f"{layer}mlp/{part}/kernel"] = conv1d(f"{block}mlp.{part}")
        names[f"{layer}mlp/{part}/bias"] = vector(f"{block}mlp.{part}_bias")
    for sublayer, name in {**attentions, "mlp": "mlp"}.items():
        for part in ("scale", "bias"):
            names[f"{layer}{sublayer}_norm_residual/{part}"] = vector(f"{block}{name}_norm.{part}")
    return names


SIZES = ("vocab", "context", "layers", "width", "heads", "head_dim", "hidden", "eps", "decoder_start")


@dataclass(frozen=True)
class Transformer(ModelConfig):
    """The sizes of a Transformer; the defaults are the paper's base model."""

    vocab: int = 37000
    """Tokens of the vocabulary, one for both languages; at least the tokenizer's."""
    context: int = 512
    """The longest sequence."""
    layers: int = 6
    """Blocks of each stack."""
    width: int = 512
    """Width of the residual stream."""
    heads: int = 8
    """Attention heads."""
    head_dim: int = 64
    """Width of a head."""
    hidden: int = 2048
    """Hidden units of the feed-forward layers."""
    decoder_start: int = 0
    """The token that the decoder starts with."""
    dropout: float = 0.0
    """Dropout on embeddings and sublayer outputs (the paper's: 0.1 in the base model, 0.3 in the big one)."""
    eps: float = 1e-6
    """Added to the variance in LayerNorm."""

    family: ClassVar[str] = "transformer"
    names: ClassVar[NameMap] = NameMap(
        {
            "embedding/table": table("embedding"),
            **_stack("encoder/", "encoder", {"attention": "attention"}),
            **_stack("", "decoder", {"attention": "attention", "cross_attention": "cross"}),
        }
    )
    config_map: ClassVar[ConfigMap] = ConfigMap(
        own=True,
        keys={name: name for name in SIZES},
        defaults={"decoder_start": 0},
        architectures={"token_prediction": "Transformer", "embedding": "TransformerModel"},
    )

    def spec(self) -> ModelSpec:
        """The model's shape. Raises UserError if the width is odd."""
        if self.width % 2:
            raise UserError(f"model.width {self.width} is odd; sinusoidal positions come in pairs: make it even")
        common: dict[str, Any] = {"norm_residual": LayerNorm(eps=self.eps), "dropout": self.dropout}
        heads: dict[str, Any] = {"heads": self.heads, "kv_heads": self.heads, "head_dim": self.head_dim}
        mlp = Mlp(hidden=self.hidden, activation="relu", bias=True, **common)
        encoder = BlockSpec((SelfAttention(mask=Bidirectional(), **heads, **common), mlp))
        decoder = BlockSpec((SelfAttention(**heads, **common), CrossAttention(**heads, **common), mlp))
        return ModelSpec(
            vocab=self.vocab,
            width=self.width,
            context=self.context,
            embedding=self.embedding(padded(self.vocab)),
            stack=StackSpec.of([decoder] * self.layers),
            final_norm=None,
            head=self.head(tied=True),
            encoder=EncoderSpec(self.embedding(0), StackSpec.of([encoder] * self.layers), None, self.decoder_start),
        )

    def embedding(self, rows: int) -> Embedding:
        """A stack's input end: what section 3.4 multiplies by sqrt(width) starts as small as that undoes."""
        root = math.sqrt(self.width)
        return Embedding(rows, positions=Sinusoidal(), scale=root, dropout=self.dropout, std=1 / root)


PRESETS = {
    "transformer_base": Transformer(dropout=0.1),
    "transformer_big": Transformer(width=1024, heads=16, hidden=4096, dropout=0.3),
}
"""The paper's table 3."""
