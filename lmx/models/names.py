"""Name maps: how a family's parameters are stored in Hugging Face checkpoints, as data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmx.errors import UserError


@dataclass(frozen=True)
class Stored:
    """The tensor that holds a parameter, and how it lies there.

    Parameters of a map that name one tensor lie side by side in it, along the outputs, in the map's order.

    Attributes:
      name: the tensor's; ``{layer}`` stands for the layer's number.
      split: the parameter's axes before it are joined to one (the inputs), those from it on to another (the
        outputs); 0 joins all of them to a vector.
      transposed: the tensor is [outputs, inputs].
    """

    name: str
    split: int = 0
    transposed: bool = False

    def joined(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A parameter's shape as [inputs, outputs], or as [outputs] of a vector."""
        outputs = math.prod(shape[self.split :])
        return (math.prod(shape[: self.split]), outputs) if self.split else (outputs,)

    def turn(self, array: np.ndarray) -> np.ndarray:
        """[inputs, outputs] as it is stored, and back."""
        return array.T if self.transposed else array


@dataclass(frozen=True)
class NameMap:
    """A family's map.

    Attributes:
      stored: by the parameter's name; the layers' parameters are called ``layer/...`` whatever their segment.
      ignored: patterns of tensors that hold nothing more: buffers, and the output table where it is tied.
    """

    stored: Mapping[str, Stored] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def vector(name: str) -> Stored:
    """A scale or a bias; the axes of heads are joined."""
    return Stored(name)


def table(name: str) -> Stored:
    """Rows of embeddings, stored as they are."""
    return Stored(name, split=1)


def linear(name: str, inputs: int = 1) -> Stored:
    """A kernel whose first ``inputs`` axes are summed over, stored [out, in] as ``torch.nn.Linear`` does."""
    return Stored(name, split=inputs, transposed=True)


def conv1d(name: str, inputs: int = 1) -> Stored:
    """A kernel whose first ``inputs`` axes are summed over, stored [in, out] as GPT-2's ``Conv1D`` does."""
    return Stored(name, split=inputs)


def required(config: Mapping[str, Any], key: str) -> Any:
    """A value of a Hugging Face configuration. Raises UserError if it is not there."""
    if config.get(key) is None:
        raise UserError(f"config.json lacks {key!r}, which a {config.get('model_type', 'model')} needs")
    return config[key]


def only(config: Mapping[str, Any], **supported: Any) -> None:
    """Raises UserError for the first option that is there and not what this family computes."""
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise UserError(
                f"config.json sets {key} to {config[key]!r}; {config.get('model_type', 'this family')} is "
                f"supported with {value!r} only"
            )
