"""BERT (Devlin et al. 2018): a bidirectional encoder with norms after the residual sum, learned positions and types."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from lmx.errors import UserError
from lmx.kernels.masks import Bidirectional
from lmx.models.config import ModelConfig
from lmx.models.config_map import ConfigMap, Reader, Task, encoder_tasks
from lmx.models.names import NameMap, Stored, linear, table, vector
from lmx.models.specs import BlockSpec, ModelSpec, StackSpec, padded
from lmx.nn.attention import SelfAttention
from lmx.nn.embedding import Embedding, Learned
from lmx.nn.head import SequenceHead, TaskHead, TokenHead, Transform
from lmx.nn.mlp import Mlp
from lmx.nn.norm import LayerNorm


def dense(ours: str, theirs: str, inputs: int = 1) -> dict[str, Stored]:
    """A linear map with its bias."""
    return {f"{ours}/kernel": linear(f"{theirs}.weight", inputs=inputs), f"{ours}/bias": vector(f"{theirs}.bias")}


def norm(ours: str, theirs: str) -> dict[str, Stored]:
    """A norm with its bias."""
    return {f"{ours}/scale": vector(f"{theirs}.weight"), f"{ours}/bias": vector(f"{theirs}.bias")}


def encoder(base: str) -> dict[str, Stored]:
    """The model without its heads, and the pooler by the head that stands on it."""
    block = base + "encoder.layer.{layer}."
    return {
        "embedding/table": table(f"{base}embeddings.word_embeddings.weight"),
        "embedding/position": table(f"{base}embeddings.position_embeddings.weight"),
        "embedding/type": table(f"{base}embeddings.token_type_embeddings.weight"),
        **norm("embedding/norm", f"{base}embeddings.LayerNorm"),
        **dense("layer/attention/query", block + "attention.self.query"),
        **dense("layer/attention/key", block + "attention.self.key"),
        **dense("layer/attention/value", block + "attention.self.value"),
        **dense("layer/attention/out", block + "attention.output.dense", inputs=2),
        **norm("layer/attention_norm_residual", block + "attention.output.LayerNorm"),
        **dense("layer/mlp/up", block + "intermediate.dense"),
        **dense("layer/mlp/down", block + "output.dense"),
        **norm("layer/mlp_norm_residual", block + "output.LayerNorm"),
        **dense("tasks/pooled/transform/dense", f"{base}pooler.dense"),
        **dense("tasks/span/out", "qa_outputs"),
    }


NAMES = NameMap(
    {
        **encoder("bert."),
        **dense("head/transform/dense", "cls.predictions.transform.dense"),
        **norm("head/transform/norm", "cls.predictions.transform.LayerNorm"),
        "head/bias": vector("cls.predictions.bias", "cls.predictions.decoder.bias"),
        **dense("tasks/nsp/transform/dense", "bert.pooler.dense"),
        **dense("tasks/nsp/out", "cls.seq_relationship"),
        **dense("tasks/classes/transform/dense", "bert.pooler.dense"),
        **dense("tasks/classes/out", "classifier"),
    },
    ignored=("*embeddings.position_ids", "*pooler.dense.*", "cls.*"),
    base="bert.",
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)


@dataclass(frozen=True)
class Bert(ModelConfig):
    """The sizes of a BERT; the defaults are BERT base's."""

    vocab: int = 30522
    """Tokens of the vocabulary; at least the tokenizer's."""
    context: int = 512
    """The longest sequence."""
    layers: int = 12
    """Blocks."""
    width: int = 768
    """Width of the residual stream."""
    heads: int = 12
    """Attention heads."""
    hidden: int = 3072
    """Hidden units of the feed-forward layers."""
    types: int = 2
    """Token types: the sentences of a pair."""
    eps: float = 1e-12
    """Added to the variance in LayerNorm."""
    dropout: float = 0.0
    """Dropout on embeddings, attention probabilities, sublayer outputs and in the heads (the paper's models: 0.1)."""
    pooler: bool = True
    """Whether an embedding is the first token's state after a layer of its own; else it is the mean over the tokens."""

    family: ClassVar[str] = "bert"
    names: ClassVar[NameMap] = NAMES
    config_map: ClassVar[ConfigMap] = ConfigMap(
        keys={
            "vocab": "vocab_size",
            "context": "max_position_embeddings",
            "layers": "num_hidden_layers",
            "width": "hidden_size",
            "heads": "num_attention_heads",
            "hidden": "intermediate_size",
            "types": "type_vocab_size",
            "eps": "layer_norm_eps",
        },
        defaults={"context": 512, "types": 2, "eps": 1e-12},
        only={
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
        architectures={**encoder_tasks("Bert"), "pretraining": "BertForPreTraining"},
        ignored=(
            *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
            *("pooler_size_per_head", "pooler_type", "language", "name", "_num_labels"),
        ),
    )

    def spec(self) -> ModelSpec:
        """The model's shape. Raises UserError if the heads do not divide the width."""
        if self.width % self.heads:
            raise UserError(f"model.width {self.width} is not divisible by model.heads {self.heads}")
        common: dict[str, Any] = {"norm_residual": LayerNorm(eps=self.eps), "dropout": self.dropout}
        attention = SelfAttention(
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            mask=Bidirectional(),
            bias=True,
            out_bias=True,
            attention_dropout=self.dropout,
            **common,
        )
        mlp = Mlp(hidden=self.hidden, activation="gelu", bias=True, **common)
        return ModelSpec(
            vocab=self.vocab,
            width=self.width,
            context=self.context,
            embedding=self.embedding(),
            stack=StackSpec.of([BlockSpec((attention, mlp))] * self.layers),
            final_norm=None,
            head=self.head(tied=True, transform=Transform(norm=LayerNorm(eps=self.eps)), bias=True),
            tasks=self.task_heads(),
        )

    def embedding(self, unused: int = 0) -> Embedding:
        """The input's end; ``unused`` positions come before the first."""
        return Embedding(
            padded(self.vocab),
            positions=Learned(self.context, offset=unused),
            types=self.types,
            norm=LayerNorm(eps=self.eps),
            dropout=self.dropout,
        )

    def classifier(self) -> TaskHead:
        """The head for whole rows, on the pooler."""
        return SequenceHead("classes", self.classes, Transform("tanh"), dropout=self.dropout)

    def task_heads(self) -> tuple[TaskHead, ...]:
        """Next sentence, classes, spans or the pooled embedding."""
        pooler, mean = SequenceHead("pooled", 0, Transform("tanh")), SequenceHead("pooled", 0, pool="mean")
        heads: dict[Task, TaskHead] = {
            "pretraining": SequenceHead("nsp", 2, Transform("tanh")),
            "sequence_classification": self.classifier(),
            "token_classification": TokenHead("classes", self.classes, dropout=self.dropout),
            "question_answering": TokenHead("span", 2),
            "embedding": pooler if self.pooler else mean,
        }
        return (heads[self.task],) if self.task in heads else ()

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """Whether there is a pooler, where the file says so."""
        return {"pooler": config.value("has_pooler", True)}

    def write_more(self) -> dict[str, Any]:
        """That there is none; transformers' files do not say it, its class is the same."""
        return {} if self.pooler else {"has_pooler": False}

    def for_tensors(self, names: Collection[str]) -> Self:
        """The same, without the pooler if a bare model's checkpoint lacks it."""
        there = any(name.endswith("pooler.dense.weight") for name in names)
        return replace(self, pooler=there) if self.task == "embedding" else self


PRESETS = {
    "bert_base": Bert(task="pretraining"),
    "bert_large": Bert(layers=24, width=1024, heads=16, hidden=4096, task="pretraining"),
}
"""Published sizes, of the uncased English models."""
