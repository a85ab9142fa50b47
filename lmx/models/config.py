"""The base class of the families' configurations."""

import abc
import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lmx.models.config_map import CLASSIFYING, ConfigMap, Reader, Task
from lmx.models.names import NameMap
from lmx.models.specs import ModelSpec, padded
from lmx.nn.head import Head, SequenceHead, TaskHead, TokenHead


@dataclass(frozen=True)
class ModelConfig(abc.ABC):
    """A family's own few numbers, from which it builds the model's spec."""

    vocab: int = 50257
    """Tokens of the vocabulary; at least the tokenizer's."""
    context: int = 1024
    """The longest sequence."""
    task: Task = "token_prediction"
    """What the heads are for."""
    classes: int = 2
    """Outputs of a classifying head."""

    family: ClassVar[str] = ""
    """The family's name; Hugging Face's ``model_type``."""
    also: ClassVar[tuple[str, ...]] = ()
    """Model types beside it that :meth:`from_huggingface` takes: larger models of which this is a part."""
    config_map: ClassVar[ConfigMap] = ConfigMap()
    """Where its numbers are in a Hugging Face ``config.json``."""

    @property
    def names(self) -> NameMap:
        """Where its parameters are in a Hugging Face checkpoint; most families have one map, as a class variable."""
        return NameMap()

    @abc.abstractmethod
    def spec(self) -> ModelSpec:
        """The model's shape.

        Raises:
          UserError: numbers that do not fit each other.
        """

    def head(self, *, tied: bool, **options: Any) -> Head | None:
        """The head that predicts tokens, if the task has one; ``options`` are :class:`~lmx.nn.head.Head`'s."""
        predicts = self.task in ("token_prediction", "pretraining")
        return Head(padded(self.vocab), tied=tied, **options) if predicts else None

    def task_heads(self) -> tuple[TaskHead, ...]:
        """The heads of the other tasks; here those of decoder-only models, where a row's last token stands for it."""
        heads: dict[Task, TaskHead] = {
            "sequence_classification": SequenceHead("classes", self.classes, pool="last", bias=False),
            "token_classification": TokenHead("classes", self.classes),
            "question_answering": TokenHead("span", 2),
            "embedding": SequenceHead("pooled", 0, pool="last"),
        }
        return (heads[self.task],) if self.task in heads else ()

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Self:
        """The configuration in the content of a ``config.json``.

        Raises:
          UserError: a number that is missing, or an option that the family does not compute.
        """
        reader = Reader(config)
        values = cls.config_map.read(reader) | cls.read_more(reader)
        values |= cls.config_map.read_task(config)
        cls.config_map.warn_unread(reader)
        return cls(**values)

    def for_tensors(self, names: Collection[str]) -> Self:
        """The configuration of the checkpoint that has tensors of these names, where ``config.json`` leaves it open
        what is there; here it never does."""
        return self

    def to_huggingface(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers reads: the inverse of :meth:`from_huggingface`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        entries = {
            "model_type": self.family,
            "architectures": [self.config_map.architecture(self.task)],
            **self.config_map.write(values),
            **self.write_more(),
        }
        if self.task in CLASSIFYING:
            labels = [f"LABEL_{i}" for i in range(self.classes)]
            entries["id2label"] = {str(i): label for i, label in enumerate(labels)}
            entries["label2id"] = {label: i for i, label in enumerate(labels)}
        return entries

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """Fields that take more than one key, or more than copying; none by default."""
        return {}

    def write_more(self) -> dict[str, Any]:
        """The entries of ``config.json`` for those fields."""
        return {}
