"""The base class of the families' configurations."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lmx.models.names import NameMap
from lmx.models.specs import ModelSpec


@dataclass(frozen=True)
class ModelConfig(abc.ABC):
    """A family's own few numbers, from which it builds the model's spec."""

    vocab: int = 50257
    """Tokens of the vocabulary; at least the tokenizer's."""
    context: int = 1024
    """The longest sequence."""

    family: ClassVar[str] = ""
    """The family's name; Hugging Face's ``model_type``."""
    names: ClassVar[NameMap] = NameMap()
    """Where its parameters are in a Hugging Face checkpoint."""

    @abc.abstractmethod
    def spec(self) -> ModelSpec:
        """The model's shape.

        Raises:
          UserError: numbers that do not fit each other.
        """

    @classmethod
    @abc.abstractmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Self:
        """The configuration in the content of a ``config.json``.

        Raises:
          UserError: a number that is missing, or an option that the family does not compute.
        """
