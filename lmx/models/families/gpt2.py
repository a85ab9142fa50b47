"""GPT-2 (Radford et al. 2019): pre-norm, learned positions, biases, GELU (tanh form), tied output table."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from lmx.errors import UserError
from lmx.models.config import ModelConfig
from lmx.models.config_map import ConfigMap, Reader
from lmx.models.names import NameMap, conv1d, linear, table, vector
from lmx.models.specs import BlockSpec, ModelSpec, StackSpec, padded
from lmx.nn.attention import SelfAttention
from lmx.nn.embedding import Embedding, Learned
from lmx.nn.mlp import Mlp
from lmx.nn.norm import LayerNorm

BLOCK = "transformer.h.{layer}."
NAMES = NameMap(
    {
        "embedding/table": table("transformer.wte.weight"),
        "embedding/position": table("transformer.wpe.weight"),
        "layer/attention_norm_in/scale": vector(BLOCK + "ln_1.weight"),
        "layer/attention_norm_in/bias": vector(BLOCK + "ln_1.bias"),
        "layer/attention/query/kernel": conv1d(BLOCK + "attn.c_attn.weight"),
        "layer/attention/key/kernel": conv1d(BLOCK + "attn.c_attn.weight"),
        "layer/attention/value/kernel": conv1d(BLOCK + "attn.c_attn.weight"),
        "layer/attention/query/bias": vector(BLOCK + "attn.c_attn.bias"),
        "layer/attention/key/bias": vector(BLOCK + "attn.c_attn.bias"),
        "layer/attention/value/bias": vector(BLOCK + "attn.c_attn.bias"),
        "layer/attention/out/kernel": conv1d(BLOCK + "attn.c_proj.weight", inputs=2),
        "layer/attention/out/bias": vector(BLOCK + "attn.c_proj.bias"),
        "layer/mlp_norm_in/scale": vector(BLOCK + "ln_2.weight"),
        "layer/mlp_norm_in/bias": vector(BLOCK + "ln_2.bias"),
        "layer/mlp/up/kernel": conv1d(BLOCK + "mlp.c_fc.weight"),
        "layer/mlp/up/bias": vector(BLOCK + "mlp.c_fc.bias"),
        "layer/mlp/down/kernel": conv1d(BLOCK + "mlp.c_proj.weight"),
        "layer/mlp/down/bias": vector(BLOCK + "mlp.c_proj.bias"),
        "final_norm/scale": vector("transformer.ln_f.weight"),
        "final_norm/bias": vector("transformer.ln_f.bias"),
        "tasks/classes/out/kernel": linear("score.weight"),
        "tasks/span/out/kernel": linear("qa_outputs.weight"),
        "tasks/span/out/bias": vector("qa_outputs.bias"),
    },
    ignored=("*.attn.bias", "*.attn.masked_bias", "lm_head.weight"),
    base="transformer.",
    tasks={
        "token_classification": {
            "tasks/classes/out/kernel": linear("classifier.weight"),
            "tasks/classes/out/bias": vector("classifier.bias"),
        }
    },
)


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
    eps: float = 1e-5
    """Added to the variance in LayerNorm."""

    family: ClassVar[str] = "gpt2"
    names: ClassVar[NameMap] = NAMES
    config_map: ClassVar[ConfigMap] = ConfigMap(
        keys={
            "vocab": "vocab_size",
            "context": "n_positions",
            "layers": "n_layer",
            "width": "n_embd",
            "heads": "n_head",
            "eps": "layer_norm_epsilon",
        },
        defaults={"eps": 1e-5},
        only={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "tie_word_embeddings": True,
        },
        architectures={
            "token_prediction": "GPT2LMHeadModel",
            "sequence_classification": "GPT2ForSequenceClassification",
            "token_classification": "GPT2ForTokenClassification",
            "question_answering": "GPT2ForQuestionAnswering",
            "embedding": "GPT2Model",
        },
        ignored=("n_ctx",),
    )

    def spec(self) -> ModelSpec:
        """The model's shape. Raises UserError if the heads do not divide the width."""
        if self.width % self.heads:
            raise UserError(f"model.width {self.width} is not divisible by model.heads {self.heads}")
        common: dict[str, Any] = {
            "norm_in": LayerNorm(eps=self.eps),
            "dropout": self.dropout,
            "std": 0.02,
            "out_std": 0.02 / math.sqrt(2 * self.layers),
        }
        attention = SelfAttention(
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            bias=True,
            out_bias=True,
            attention_dropout=self.dropout,
            **common,
        )
        mlp = Mlp(hidden=4 * self.width, activation="gelu_tanh", bias=True, **common)
        return ModelSpec(
            vocab=self.vocab,
            width=self.width,
            context=self.context,
            embedding=Embedding(padded(self.vocab), positions=Learned(self.context), dropout=self.dropout),
            stack=StackSpec.of([BlockSpec((attention, mlp))] * self.layers),
            final_norm=LayerNorm(eps=self.eps),
            head=self.head(tied=True),
            tasks=self.task_heads(),
        )

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """Nothing more: the feed-forward layer is four times as wide as the residual stream."""
        config.only("n_inner", 4 * config.value("n_embd"))
        return {}


PRESETS = {
    "gpt2_124m": Gpt2(),
    "gpt2_355m": Gpt2(layers=24, width=1024, heads=16),
    "gpt2_774m": Gpt2(layers=36, width=1280, heads=20),
    "gpt2_1558m": Gpt2(layers=48, width=1600, heads=25),
}
"""Published sizes."""
