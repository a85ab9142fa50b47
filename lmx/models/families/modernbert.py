"""ModernBERT (Warner et al. 2024): a bidirectional encoder with rotary positions, GEGLU and mostly local attention."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lmx.errors import UserError
from lmx.kernels.masks import Bidirectional, BidirectionalWindow, Mask
from lmx.models.config import ModelConfig
from lmx.models.config_map import ConfigMap, Reader, Task, encoder_tasks
from lmx.models.names import NameMap, linear, table, vector
from lmx.models.rope import read_rope
from lmx.models.specs import BlockSpec, ModelSpec, StackSpec, padded
from lmx.nn.activation import Glu
from lmx.nn.attention import SelfAttention
from lmx.nn.embedding import Embedding
from lmx.nn.head import Pool, SequenceHead, TaskHead, TokenHead, Transform
from lmx.nn.mlp import Mlp
from lmx.nn.norm import LayerNorm
from lmx.nn.position import Rope

BLOCK = "model.layers.{layer}."
KERNELS = {  # The parts of Wqkv and Wi follow each other.
    "layer/attention/query": BLOCK + "attn.Wqkv",
    "layer/attention/key": BLOCK + "attn.Wqkv",
    "layer/attention/value": BLOCK + "attn.Wqkv",
    "layer/mlp/gate": BLOCK + "mlp.Wi",
    "layer/mlp/up": BLOCK + "mlp.Wi",
    "layer/mlp/down": BLOCK + "mlp.Wo",
    "head/transform/dense": "head.dense",
    "tasks/classes/transform/dense": "head.dense",
    "tasks/classes/out": "classifier",
    "tasks/span/transform/dense": "head.dense",
    "tasks/span/out": "classifier",
}
NORMS = {
    "embedding/norm": "model.embeddings.norm",
    "layer/attention_norm_in": BLOCK + "attn_norm",
    "layer/mlp_norm_in": BLOCK + "mlp_norm",
    "final_norm": "model.final_norm",
    "head/transform/norm": "head.norm",
    "tasks/classes/transform/norm": "head.norm",
    "tasks/span/transform/norm": "head.norm",
}
OUT = "layer/attention/out"
NAMES = NameMap(
    {
        "embedding/table": table("model.embeddings.tok_embeddings.weight"),
        **{f"{ours}/kernel": linear(f"{theirs}.weight") for ours, theirs in KERNELS.items()},
        f"{OUT}/kernel": linear(BLOCK + "attn.Wo.weight", inputs=2),
        **{f"{ours}/scale": vector(f"{theirs}.weight") for ours, theirs in NORMS.items()},
        **{f"{ours}/bias": vector(f"{theirs}.bias") for ours, theirs in (KERNELS | NORMS).items()},
        f"{OUT}/bias": vector(BLOCK + "attn.Wo.bias"),
        "head/bias": vector("decoder.bias"),
    },
    ignored=("*rotary_emb.*", "decoder.weight", "decoder.bias", "head.*"),
    base="model.",
)
POOLS: dict[str, Pool] = {"cls": "first", "mean": "mean"}


@dataclass(frozen=True)
class ModernBert(ModelConfig):
    """The sizes of a ModernBERT; the defaults are the base model's."""

    vocab: int = 50368
    """Tokens of the vocabulary; at least the tokenizer's."""
    context: int = 8192
    """The longest sequence."""
    layers: int = 22
    """Blocks."""
    width: int = 768
    """Width of the residual stream."""
    heads: int = 12
    """Attention heads."""
    hidden: int = 1152
    """Hidden units of the feed-forward layers."""
    every: int = 3
    """Every so many layers, from the first on, one sees everything; the others see a window."""
    window: int = 128
    """That window: half of it to each side."""
    theta: float = 160_000.0
    """The base of the rotary positions' wavelengths in the layers that see everything."""
    window_theta: float = 10_000.0
    """The same in the layers that see a window."""
    eps: float = 1e-5
    """Added to the variance in LayerNorm."""
    attention_bias: bool = False
    """Biases in attention."""
    mlp_bias: bool = False
    """Biases in the feed-forward layers."""
    norm_bias: bool = False
    """Biases in the norms."""
    head_bias: bool = False
    """Biases in the heads' first layer."""
    vocab_bias: bool = True
    """A bias for each token that is predicted."""
    pooling: Literal["cls", "mean"] = "cls"
    """What of a row is classified: its first token, or the mean over all."""
    padding: int | None = None
    """The padding token, which transformers wants to know."""
    dropout: float = 0.0
    """Dropout on embeddings, feed-forward outputs and in the heads."""

    family: ClassVar[str] = "modernbert"
    names: ClassVar[NameMap] = NAMES
    config_map: ClassVar[ConfigMap] = ConfigMap(
        keys={
            "vocab": "vocab_size",
            "context": "max_position_embeddings",
            "layers": "num_hidden_layers",
            "width": "hidden_size",
            "heads": "num_attention_heads",
            "hidden": "intermediate_size",
            "window": "local_attention",
            "eps": "norm_eps",
            "attention_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
            "norm_bias": "norm_bias",
            "head_bias": "classifier_bias",
            "vocab_bias": "decoder_bias",
            "pooling": "classifier_pooling",
            "padding": "pad_token_id",
        },
        defaults={
            "context": 8192,
            "window": 128,
            "eps": 1e-5,
            "attention_bias": False,
            "mlp_bias": False,
            "norm_bias": False,
            "head_bias": False,
            "vocab_bias": True,
            "pooling": "cls",
            "padding": None,
        },
        only={"hidden_activation": "gelu", "classifier_activation": "gelu", "tie_word_embeddings": True},
        architectures=encoder_tasks("ModernBert"),
        ignored=(
            *("deterministic_flash_attn", "initializer_cutoff_factor", "layer_norm_eps", "mlp_dropout"),
            *("reference_compile", "repad_logits_with_grad", "sparse_prediction", "sparse_pred_ignore_index"),
        ),
    )

    def spec(self) -> ModelSpec:
        """The model's shape. Raises UserError if the heads do not divide the width."""
        if self.width % self.heads:
            raise UserError(f"model.width {self.width} is not divisible by model.heads {self.heads}")
        return ModelSpec(
            vocab=self.vocab,
            width=self.width,
            context=self.context,
            embedding=Embedding(padded(self.vocab), norm=self.norm(), dropout=self.dropout),
            stack=StackSpec.of(self.block(layer) for layer in range(self.layers)),
            final_norm=self.norm(),
            head=self.head(tied=True, transform=self.transform(), bias=self.vocab_bias),
            tasks=self.task_heads(),
        )

    def norm(self) -> LayerNorm:
        """Every norm."""
        return LayerNorm(eps=self.eps, bias=self.norm_bias)

    def block(self, layer: int) -> BlockSpec:
        """A layer's block: the embedding's norm is the first one's."""
        everything = layer % self.every == 0
        mask: Mask = Bidirectional() if everything else BidirectionalWindow(self.window // 2)
        attention = SelfAttention(
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            mask=mask,
            rope=Rope(self.theta if everything else self.window_theta),
            bias=self.attention_bias,
            out_bias=self.attention_bias,
            norm_in=self.norm() if layer else None,
        )
        options: dict[str, Any] = {"bias": self.mlp_bias, "norm_in": self.norm(), "dropout": self.dropout}
        return BlockSpec((attention, Mlp(hidden=self.hidden, activation=Glu("gelu"), **options)))

    def transform(self) -> Transform:
        """The layer that every head begins with."""
        return Transform("gelu", self.norm(), bias=self.head_bias)

    def task_heads(self) -> tuple[TaskHead, ...]:
        """Next sentence (of lmx alone), classes, spans, or the mean over the tokens as an embedding."""
        first: dict[str, Any] = {"transform": self.transform(), "dropout": self.dropout}
        heads: dict[Task, TaskHead] = {
            "pretraining": SequenceHead("nsp", 2, Transform("tanh")),
            "sequence_classification": SequenceHead("classes", self.classes, **first, pool=POOLS[self.pooling]),
            "token_classification": TokenHead("classes", self.classes, **first),
            "question_answering": TokenHead("span", 2, **first),
            "embedding": SequenceHead("pooled", 0, pool="mean"),
        }
        return (heads[self.task],) if self.task in heads else ()

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """Which layers see everything, and the rotary bases, in transformers' older or newer form."""
        theta = _theta(config, "full_attention", config.value("global_rope_theta", 160_000.0))
        local = config.get("local_rope_theta", 10_000.0)  # null stands for the other layers'
        every = _every(config.value("layer_types", ()), config.value("global_attn_every_n_layers", 3))
        return {
            "every": every,
            "theta": theta,
            "window_theta": _theta(config, "sliding_attention", theta if local is None else local),
        }

    def write_more(self) -> dict[str, Any]:
        """The entries for those, in the older form, which both read, and the kinds of layers in the newer one too."""
        kinds = ["sliding_attention" if layer % self.every else "full_attention" for layer in range(self.layers)]
        thetas = {"global_rope_theta": self.theta, "local_rope_theta": self.window_theta}
        return {"global_attn_every_n_layers": self.every, "layer_types": kinds, **thetas}


def _theta(config: Reader, layer_type: str, default: float) -> float:
    """The rotary base of a kind of layers. Raises UserError if positions are scaled there."""
    head_dim = config.value("hidden_size") // config.value("num_attention_heads")
    rope = read_rope(config, head_dim=head_dim, layer_type=layer_type, theta=default)
    if rope != Rope(rope.theta):
        raise UserError(f"config.json scales the rotary positions of {layer_type}; a modernbert is supported unscaled")
    return rope.theta


def _every(kinds: tuple[str, ...] | list[str], given: int) -> int:
    """The period of the layers that see everything. Raises UserError if there is none."""
    everything = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    for every in (given, *range(1, len(kinds) + 1)):
        if not kinds or everything == list(range(0, len(kinds), every)):
            return every
    raise UserError(f"config.json has full_attention in layers {everything}, expected every third or so from 0 on")


PRESETS = {
    "modernbert_base": ModernBert(pooling="mean", padding=50283),
    "modernbert_large": ModernBert(layers=28, width=1024, heads=16, hidden=2624, pooling="mean", padding=50283),
}
"""Published sizes."""
