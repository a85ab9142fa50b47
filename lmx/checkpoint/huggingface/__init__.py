"""Hugging Face directories: a family's configuration, and its parameters from and to their tensors."""

from lmx.checkpoint.huggingface.directory import Checkpoint, open_directory, read_config
from lmx.checkpoint.huggingface.export import (
    export_params,
    export_tensors,
    new_directory,
    verify_tensors,
    write_json,
    write_shards,
    write_tensors,
)
from lmx.checkpoint.huggingface.load import import_params, import_tensors
from lmx.checkpoint.huggingface.quantized import dequantized
from lmx.checkpoint.huggingface.tensors import InMemory, Tensors, find_tensors

__all__ = [
    "Checkpoint",
    "InMemory",
    "Tensors",
    "dequantized",
    "export_params",
    "export_tensors",
    "find_tensors",
    "import_params",
    "import_tensors",
    "new_directory",
    "open_directory",
    "read_config",
    "verify_tensors",
    "write_json",
    "write_shards",
    "write_tensors",
]
