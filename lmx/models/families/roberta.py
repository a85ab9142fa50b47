"""RoBERTa (Liu et al. 2019): BERT without sentence pairs; positions are counted from beyond the padding token."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lmx.models.config_map import ConfigMap, Reader, encoder_tasks
from lmx.models.families.bert import Bert, dense, encoder, norm
from lmx.models.names import NameMap, vector
from lmx.nn.embedding import Embedding
from lmx.nn.head import SequenceHead, TaskHead, Transform

NAMES = NameMap(
    {
        **encoder("roberta."),
        **dense("head/transform/dense", "lm_head.dense"),
        **norm("head/transform/norm", "lm_head.layer_norm"),
        "head/bias": vector("lm_head.bias", "lm_head.decoder.bias"),
        **dense("tasks/classes/transform/dense", "classifier.dense"),
        **dense("tasks/classes/out", "classifier.out_proj"),
    },
    ignored=("*embeddings.position_ids", "*pooler.dense.*", "lm_head.*"),
    base="roberta.",
    tasks={"token_classification": dense("tasks/classes/out", "classifier")},
)


@dataclass(frozen=True)
class Roberta(Bert):
    """The sizes of a RoBERTa; the defaults are RoBERTa base's."""

    vocab: int = 50265
    """Tokens of the vocabulary; at least the tokenizer's."""
    types: int = 1
    """Token types."""
    eps: float = 1e-5
    """Added to the variance in LayerNorm."""
    padding: int = 1
    """The padding token; the table of positions has as many unused rows, and one more."""

    family: ClassVar[str] = "roberta"
    names: ClassVar[NameMap] = NAMES
    config_map: ClassVar[ConfigMap] = replace(
        Bert.config_map,
        keys={**Bert.config_map.keys, "padding": "pad_token_id"},
        defaults={**Bert.config_map.defaults, "padding": 1},
        architectures=encoder_tasks("Roberta"),
    )

    def embedding(self, unused: int = 0) -> Embedding:
        """The input's end."""
        return super().embedding(self.padding + 1)

    def classifier(self) -> TaskHead:
        """The head for whole rows, with a layer of its own in place of the pooler."""
        return SequenceHead("classes", self.classes, Transform("tanh", dropout=self.dropout), dropout=self.dropout)

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """The positions that are used."""
        rows, padding = config.value("max_position_embeddings", 512), config.value("pad_token_id", 1)
        return {**super().read_more(config), "context": rows - padding - 1}

    def write_more(self) -> dict[str, Any]:
        """The rows of their table."""
        return {**super().write_more(), "max_position_embeddings": self.context + self.padding + 1}


PRESETS = {
    "roberta_base": Roberta(),
    "roberta_large": Roberta(layers=24, width=1024, heads=16, hidden=4096),
}
"""Published sizes."""
