"""T5 (Raffel et al. 2020) and T5 1.1 (also FLAN-T5): pre-RMSNorm, relative position buckets, scores unscaled."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lmx.errors import UserError
from lmx.kernels.masks import Bidirectional, Causal
from lmx.kernels.relative import RelativeBuckets
from lmx.models.config import ModelConfig
from lmx.models.config_map import ConfigMap, Reader
from lmx.models.names import NameMap, Stored, linear, table, vector
from lmx.models.specs import BlockSpec, EncoderSpec, ModelSpec, StackSpec, padded
from lmx.nn.activation import Activation, Gating, Glu
from lmx.nn.attention import SelfAttention
from lmx.nn.cross_attention import CrossAttention
from lmx.nn.embedding import Embedding
from lmx.nn.head import SequenceHead, TaskHead, Transform
from lmx.nn.mlp import Mlp
from lmx.nn.norm import RmsNorm
from lmx.nn.relative import RelativeBias

Projection = Literal["relu", "gelu", "gated-gelu", "gated-silu"]
PROJECTIONS: dict[str, Activation | Gating] = {
    "relu": "relu",
    "gelu": "gelu",
    "gated-gelu": Glu("gelu_tanh"),
    "gated-silu": Glu("silu"),
}


def _attention(ours: str, theirs: str) -> dict[str, Stored]:
    kernels = {name: linear(f"{theirs}.{name[0]}.weight") for name in ("query", "key", "value")}
    kernels["out"] = linear(f"{theirs}.o.weight", inputs=2)
    return {f"{ours}/{name}/kernel": stored for name, stored in kernels.items()}


def _stack(ours: str, theirs: str, feed_forward: int, up: str) -> dict[str, Stored]:
    """One stack; ``feed_forward`` is the place of that sublayer in their blocks, and ``up`` its input kernel's name."""
    block = theirs + ".block.{layer}.layer."
    dense = f"{block}{feed_forward}.DenseReluDense."
    return {
        f"{ours}stack/shared/relative/table": table(
            f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
        f"{ours}layer/attention_norm_in/scale": vector(block + "0.layer_norm.weight"),
        **_attention(f"{ours}layer/attention", block + "0.SelfAttention"),
        f"{ours}layer/mlp_norm_in/scale": vector(f"{block}{feed_forward}.layer_norm.weight"),
        f"{ours}layer/mlp/up/kernel": linear(f"{dense}{up}.weight"),
        f"{ours}layer/mlp/gate/kernel": linear(dense + "wi_0.weight"),
        f"{ours}layer/mlp/down/kernel": linear(dense + "wo.weight"),
        f"{ours}final_norm/scale": vector(theirs + ".final_layer_norm.weight"),
    }


@dataclass(frozen=True)
class T5(ModelConfig):
    """The sizes of a T5; the defaults are T5 1.1 small's."""

    vocab: int = 32128
    """Tokens of the vocabulary; at least the tokenizer's."""
    context: int = 512
    """The longest sequence; the positions themselves have no end."""
    encoder_layers: int = 8
    """Blocks of the encoder."""
    decoder_layers: int = 8
    """Blocks of the decoder."""
    width: int = 512
    """Width of the residual stream."""
    heads: int = 6
    """Attention heads."""
    head_dim: int = 64
    """Width of a head."""
    hidden: int = 1024
    """Hidden units of the feed-forward layers."""
    feed_forward: Projection = "gated-gelu"
    """The feed-forward layers: relu in T5 1.0, gated-gelu in T5 1.1 and FLAN-T5."""
    buckets: int = 32
    """Buckets of relative positions."""
    max_distance: int = 128
    """Distances from here on share a bucket."""
    tied: bool = False
    """Whether the output table is the embedding table (T5 1.0), which scales the output by 1 / sqrt(width)."""
    decoder_start: int = 0
    """The token that the decoder starts with."""
    eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    dropout: float = 0.0
    """Dropout on embeddings, attention probabilities and sublayer outputs (the paper's models: 0.1)."""

    family: ClassVar[str] = "t5"
    config_map: ClassVar[ConfigMap] = ConfigMap(
        keys={
            "vocab": "vocab_size",
            "context": "n_positions",
            "encoder_layers": "num_layers",
            "width": "d_model",
            "heads": "num_heads",
            "head_dim": "d_kv",
            "hidden": "d_ff",
            "feed_forward": "feed_forward_proj",
            "buckets": "relative_attention_num_buckets",
            "max_distance": "relative_attention_max_distance",
            "decoder_start": "decoder_start_token_id",
            "eps": "layer_norm_epsilon",
        },
        defaults={
            "context": 512,
            "feed_forward": "relu",
            "max_distance": 128,
            "decoder_start": 0,
            "eps": 1e-6,
        },
        only={"is_encoder_decoder": True},
        architectures={
            "token_prediction": "T5ForConditionalGeneration",
            "sequence_classification": "T5ForSequenceClassification",
            "embedding": "T5Model",
        },
        ignored=("dense_act_fn", "is_gated_act"),  # they follow from feed_forward_proj
    )

    @property
    def names(self) -> NameMap:
        """Where its parameters are: gated layers have two input kernels, the others one of another name."""
        up = "wi_1" if isinstance(PROJECTIONS[self.feed_forward], Gating) else "wi"
        stored = {
            "embedding/table": table("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
            **_stack("encoder/", "encoder", 1, up),
            **_stack("", "decoder", 2, up),
            "layer/cross_attention_norm_in/scale": vector("decoder.block.{layer}.layer.1.layer_norm.weight"),
            **_attention("layer/cross_attention", "decoder.block.{layer}.layer.1.EncDecAttention"),
            "head/table": table("lm_head.weight"),
            "tasks/classes/transform/dense/kernel": linear("classification_head.dense.weight"),
            "tasks/classes/transform/dense/bias": vector("classification_head.dense.bias"),
            "tasks/classes/out/kernel": linear("classification_head.out_proj.weight"),
            "tasks/classes/out/bias": vector("classification_head.out_proj.bias"),
        }
        # 1.0 checkpoints have a table in the decoder's cross-attention that nothing reads.
        extra = ("lm_head.weight", "*.EncDecAttention.relative_attention_bias.weight", "*.embed_tokens.weight")
        return NameMap(stored, ignored=extra, renames=(("^transformer[.]", ""),))

    def spec(self) -> ModelSpec:
        """The model's shape."""
        if self.feed_forward not in PROJECTIONS:
            raise UserError(f"model.feed_forward is {self.feed_forward!r}, expected one of {', '.join(PROJECTIONS)}")
        norm = RmsNorm(eps=self.eps)
        common: dict[str, Any] = {"norm_in": norm, "dropout": self.dropout}
        heads: dict[str, Any] = {"heads": self.heads, "kv_heads": self.heads, "head_dim": self.head_dim}
        heads |= {"scale": 1.0, "attention_dropout": self.dropout}
        both, back = (RelativeBuckets(self.buckets, self.max_distance, bidirectional=b) for b in (True, False))
        mlp = Mlp(hidden=self.hidden, activation=PROJECTIONS[self.feed_forward], **common)
        look = SelfAttention(mask=Bidirectional(), relative=both, **heads, **common)
        look_back = SelfAttention(mask=Causal(), relative=back, **heads, **common)
        encoder = [BlockSpec((look, mlp))] * self.encoder_layers
        decoder = [BlockSpec((look_back, CrossAttention(**heads, **common), mlp))] * self.decoder_layers
        return ModelSpec(
            vocab=self.vocab,
            width=self.width,
            context=self.context,
            embedding=Embedding(padded(self.vocab), dropout=self.dropout),
            stack=StackSpec.of(decoder, (RelativeBias(self.heads, back),)),
            final_norm=norm,
            head=self.head(tied=self.tied, scale=self.width**-0.5 if self.tied else 1.0),
            encoder=EncoderSpec(
                Embedding(0, dropout=self.dropout),
                StackSpec.of(encoder, (RelativeBias(self.heads, both),)),
                norm,
                self.decoder_start,
            ),
            tasks=self.task_heads(),
        )

    def task_heads(self) -> tuple[TaskHead, ...]:
        """A row is classified by its last token, which ends the text."""
        transform = Transform("tanh", dropout=self.dropout)
        head = SequenceHead("classes", self.classes, transform, dropout=self.dropout, pool="last")
        return (head,) if self.task == "sequence_classification" else ()

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """The decoder's layers, as many as the encoder's where they are not given, and whether the tables are tied:
        transformers 5 writes tie_word_embeddings for the input tables only, and the output's apart."""
        tied = config.value("tie_word_embeddings", True) and config.value("scale_decoder_outputs", True)
        return {"decoder_layers": config.value("num_decoder_layers", config.value("num_layers")), "tied": tied}

    def write_more(self) -> dict[str, Any]:
        """The entries for those."""
        tied = {"tie_word_embeddings": self.tied, "scale_decoder_outputs": self.tied}
        return {"num_decoder_layers": self.decoder_layers, "pad_token_id": 0, "eos_token_id": 1, **tied}


PRESETS = {
    "t5_small": T5(encoder_layers=6, decoder_layers=6, heads=8, hidden=2048, feed_forward="relu", tied=True),
    "t5_v1_1_small": T5(),
    "t5_v1_1_base": T5(width=768, encoder_layers=12, decoder_layers=12, heads=12, hidden=2048),
    "t5_v1_1_large": T5(width=1024, encoder_layers=24, decoder_layers=24, heads=16, hidden=2816),
    "t5_v1_1_xl": T5(width=2048, encoder_layers=24, decoder_layers=24, heads=32, hidden=5120),
    "t5_v1_1_xxl": T5(width=4096, encoder_layers=24, decoder_layers=24, heads=64, hidden=10240),
}
"""Published sizes; FLAN-T5 has those of T5 1.1."""
