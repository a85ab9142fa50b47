"""A Hugging Face directory, opened: its configuration, and its tensors before they are read."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmx.checkpoint.huggingface.quantized import dequantized
from lmx.checkpoint.huggingface.tensors import Tensors, find_tensors, read_json
from lmx.config import nearest
from lmx.errors import UserError
from lmx.models import families
from lmx.models.config import ModelConfig


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds of a model.

    Attributes:
      directory: where it is.
      config_json: the content of its ``config.json``.
      config: the model's configuration, read from that.
      tensors: its tensors, quantized ones seen as bfloat16; nothing is read yet.
    """

    directory: Path
    config_json: Mapping[str, Any]
    config: ModelConfig
    tensors: Tensors


def open_directory(directory: str | os.PathLike[str]) -> Checkpoint:
    """Opens a Hugging Face directory: ``config.json`` and ``model.safetensors``, or shards and their index.

    Raises:
      UserError: no such directory, no configuration, an architecture that is no family here, or tensors that are
        missing, not whole, pickled, or quantized in a way that is not read.
    """
    path = Path(directory)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give one with a config.json and *.safetensors")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; is it a Hugging Face model directory?")
    config_json = read_json(path / "config.json")
    config = read_config(config_json)
    tensors = dequantized(find_tensors(path), config_json)
    return Checkpoint(path, config_json, config.for_tensors(list(tensors)), tensors)


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The configuration in the content of a Hugging Face ``config.json``.

    Raises:
      UserError: a model type that is no family here, a missing number, or an option that the family lacks.
    """
    known, kind = families.known(), config.get("model_type")
    if kind not in known:
        raise UserError(f"config.json has the model_type {kind!r}, expected {nearest(str(kind), known)}")
    return known[kind].from_huggingface(config)
