"""BART (Lewis et al. 2020): an encoder-decoder with norms after the residual sum and learned positions."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lmx.errors import UserError
from lmx.kernels.masks import Bidirectional
from lmx.models.config import ModelConfig
from lmx.models.config_map import ConfigMap
from lmx.models.names import NameMap, Stored, linear, row, table, vector
from lmx.models.specs import BlockSpec, EncoderSpec, ModelSpec, StackSpec, padded
from lmx.nn.activation import Activation
from lmx.nn.attention import SelfAttention
from lmx.nn.cross_attention import CrossAttention
from lmx.nn.embedding import Embedding, Learned, Positions
from lmx.nn.head import SequenceHead, TaskHead, TokenHead, Transform
from lmx.nn.mlp import Mlp
from lmx.nn.norm import LayerNorm, Norm

Function = Literal["gelu", "gelu_new", "relu", "silu", "swish"]
FUNCTIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def _norm(ours: str, theirs: str) -> dict[str, Stored]:
    return {f"{ours}/scale": vector(f"{theirs}.weight"), f"{ours}/bias": vector(f"{theirs}.bias")}


def _attention(ours: str, theirs: str) -> dict[str, Stored]:
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    kernels = {f"{ours}/{p}/kernel": linear(f"{theirs}.{t}.weight", inputs=1 + (p == "out")) for p, t in parts.items()}
    return kernels | {f"{ours}/{p}/bias": vector(f"{theirs}.{t}.bias") for p, t in parts.items()}


def _stack(ours: str, theirs: str) -> dict[str, Stored]:
    block = theirs + ".layers.{layer}."
    return {
        f"{ours}embedding/position": table(f"{theirs}.embed_positions.weight"),
        **_norm(f"{ours}embedding/norm", f"{theirs}.layernorm_embedding"),
        **_attention(f"{ours}layer/attention", block + "self_attn"),
        **_norm(f"{ours}layer/attention_norm_residual", block + "self_attn_layer_norm"),
        f"{ours}layer/mlp/up/kernel": linear(block + "fc1.weight"),
        f"{ours}layer/mlp/up/bias": vector(block + "fc1.bias"),
        f"{ours}layer/mlp/down/kernel": linear(block + "fc2.weight"),
        f"{ours}layer/mlp/down/bias": vector(block + "fc2.bias"),
        **_norm(f"{ours}layer/mlp_norm_residual", block + "final_layer_norm"),
    }


NAMES = NameMap(
    {
        "embedding/table": table(
            "model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"
        ),
        **_stack("encoder/", "model.encoder"),
        **_stack("", "model.decoder"),
        **_attention("layer/cross_attention", "model.decoder.layers.{layer}.encoder_attn"),
        **_norm("layer/cross_attention_norm_residual", "model.decoder.layers.{layer}.encoder_attn_layer_norm"),
        "head/bias": row("final_logits_bias"),
        "tasks/classes/transform/dense/kernel": linear("classification_head.dense.weight"),
        "tasks/classes/transform/dense/bias": vector("classification_head.dense.bias"),
        "tasks/classes/out/kernel": linear("classification_head.out_proj.weight"),
        "tasks/classes/out/bias": vector("classification_head.out_proj.bias"),
        "tasks/span/out/kernel": linear("qa_outputs.weight"),
        "tasks/span/out/bias": vector("qa_outputs.bias"),
    },
    ignored=("lm_head.weight", "*.embed_tokens.weight", "final_logits_bias"),
    base="model.",
)


@dataclass(frozen=True)
class Bart(ModelConfig):
    """The sizes of a BART; the defaults are BART large's."""

    vocab: int = 50265
    """Tokens of the vocabulary; at least the tokenizer's."""
    width: int = 1024
    """Width of the residual stream."""
    encoder_layers: int = 12
    """Blocks of the encoder."""
    decoder_layers: int = 12
    """Blocks of the decoder."""
    encoder_heads: int = 16
    """Attention heads of the encoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    encoder_hidden: int = 4096
    """Hidden units of the encoder's feed-forward layers."""
    decoder_hidden: int = 4096
    """Hidden units of the decoder's feed-forward layers."""
    activation: Function = "gelu"
    """The feed-forward layers' function."""
    scaled: bool = False
    """Whether embeddings are multiplied by sqrt(width)."""
    decoder_start: int = 2
    """The token that the decoder starts with."""
    dropout: float = 0.0
    """Dropout on embeddings and sublayer outputs (the paper's models: 0.1)."""

    family: ClassVar[str] = "bart"
    names: ClassVar[NameMap] = NAMES
    config_map: ClassVar[ConfigMap] = ConfigMap(
        keys={
            "vocab": "vocab_size",
            "context": "max_position_embeddings",
            "width": "d_model",
            "encoder_layers": "encoder_layers",
            "decoder_layers": "decoder_layers",
            "encoder_heads": "encoder_attention_heads",
            "decoder_heads": "decoder_attention_heads",
            "encoder_hidden": "encoder_ffn_dim",
            "decoder_hidden": "decoder_ffn_dim",
            "activation": "activation_function",
            "scaled": "scale_embedding",
            "decoder_start": "decoder_start_token_id",
        },
        defaults={"activation": "gelu", "scaled": False, "decoder_start": 2},
        # The first checkpoints name BART's arrangement by switches of the code base that they come from.
        only={
            "tie_word_embeddings": True,
            "is_encoder_decoder": True,
            "normalize_before": False,
            "normalize_embedding": True,
            "add_final_layer_norm": False,
            "add_bias_logits": False,
            "static_position_embeddings": False,
            "extra_pos_embeddings": 2,
        },
        architectures={
            "token_prediction": "BartForConditionalGeneration",
            "sequence_classification": "BartForSequenceClassification",
            "question_answering": "BartForQuestionAnswering",
            "embedding": "BartModel",
        },
        ignored=(
            *("activation_dropout", "classif_dropout", "decoder_layerdrop", "encoder_layerdrop", "num_hidden_layers"),
            *("early_stopping", "no_repeat_ngram_size", "num_beams", "length_penalty", "min_length"),  # generation's
        ),
    )

    def spec(self) -> ModelSpec:
        """The model's shape. Raises UserError if the heads do not divide the width."""
        for heads in (self.encoder_heads, self.decoder_heads):
            if self.width % heads:
                raise UserError(f"model.width {self.width} is not divisible by {heads} heads")
        look = self.attention(self.encoder_heads, mask=Bidirectional())
        look_back, cross = self.attention(self.decoder_heads), self.cross_attention(self.decoder_heads)
        encoder = BlockSpec((look, self.mlp(self.encoder_hidden)))
        decoder = BlockSpec((look_back, cross, self.mlp(self.decoder_hidden)))
        return ModelSpec(
            vocab=self.vocab,
            width=self.width,
            context=self.context,
            embedding=self.embedding(padded(self.vocab)),
            stack=StackSpec.of([decoder] * self.decoder_layers),
            final_norm=None,
            head=self.head(tied=True, bias=True),
            encoder=EncoderSpec(
                self.embedding(0), StackSpec.of([encoder] * self.encoder_layers), None, self.decoder_start
            ),
            tasks=self.task_heads(),
        )

    def positions(self) -> Positions:
        """The positions of both stacks."""
        return Learned(self.context, offset=2)

    def norm(self) -> Norm:
        """The norm after each residual sum."""
        return LayerNorm(eps=1e-5)

    def embedding(self, rows: int, **more: Any) -> Embedding:
        """A stack's input end; ``more`` are fields of it in which a family differs."""
        options: dict[str, Any] = {"positions": self.positions(), "norm": self.norm(), "dropout": self.dropout}
        return Embedding(rows, scale=math.sqrt(self.width) if self.scaled else 1.0, **options | more)

    def _sublayer(self) -> dict[str, Any]:
        return {"norm_residual": self.norm(), "dropout": self.dropout}

    def attention(self, heads: int, **more: Any) -> SelfAttention:
        """A stack's self-attention; ``more`` are fields of it in which a family differs."""
        sizes = {"heads": heads, "kv_heads": heads, "head_dim": self.width // heads}
        return SelfAttention(**{**sizes, "bias": True, "out_bias": True, **self._sublayer(), **more})

    def cross_attention(self, heads: int, **more: Any) -> CrossAttention:
        """The decoder's attention to the encoder."""
        sizes = {"heads": heads, "kv_heads": heads, "head_dim": self.width // heads}
        return CrossAttention(**{**sizes, "bias": True, "out_bias": True, **self._sublayer(), **more})

    def mlp(self, hidden: int) -> Mlp:
        """A stack's feed-forward layer."""
        return Mlp(hidden=hidden, activation=FUNCTIONS[self.activation], bias=True, **self._sublayer())

    def task_heads(self) -> tuple[TaskHead, ...]:
        """A row is classified by the decoder's state at its last token, which ends the text."""
        if self.task == "question_answering":
            return (TokenHead("span", 2),)
        head = SequenceHead(
            "classes", self.classes, Transform("tanh", dropout=self.dropout), dropout=self.dropout, pool="last"
        )
        return (head,) if self.task == "sequence_classification" else ()


PRESETS = {
    "bart_base": Bart(
        width=768,
        encoder_layers=6,
        decoder_layers=6,
        encoder_heads=12,
        decoder_heads=12,
        encoder_hidden=3072,
        decoder_hidden=3072,
    ),
    "bart_large": Bart(),
}
"""Published sizes."""
