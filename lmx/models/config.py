"""The base class of the families' configurations."""

import abc
from dataclasses import dataclass
from typing import ClassVar

from lmx.models.specs import ModelSpec


@dataclass(frozen=True)
class ModelConfig(abc.ABC):
    """A family's own few numbers, from which it builds the model's spec."""

    vocab: int = 50257
    """Tokens of the vocabulary; at least the tokenizer's."""
    context: int = 1024
    """The longest sequence."""

    family: ClassVar[str] = ""

    @abc.abstractmethod
    def spec(self) -> ModelSpec:
        """The model's shape.

        Raises:
          UserError: numbers that do not fit each other.
        """
