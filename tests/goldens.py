"""The tiny random models of tests/golden, with the outputs that their references compute for them."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lmx.checkpoint.huggingface import import_tensors, read_config
from lmx.models.config import ModelConfig
from lmx.models.model import Inputs
from lmx.models.specs import ModelSpec
from lmx.nn.module import Params


@dataclass(frozen=True)
class Golden:
    """A tiny random model of tests/golden, with the outputs that transformers (or a paper) computes for it.

    ``outputs`` has, as the model gives them: logits, hidden (an encoder's), nsp, pooled, task.
    """

    name: str
    config_json: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]

    @functools.cached_property
    def spec(self) -> ModelSpec:
        return self.config.spec()

    @functools.cached_property
    def params(self) -> Params:
        return cast(Params, jax.tree.map(np.asarray, import_tensors(self.config, self.tensors)))

    @property
    def tokens(self) -> np.ndarray:
        return self.arrays["tokens"]

    @property
    def logits(self) -> np.ndarray:
        return self.arrays["logits"]

    @property
    def loss(self) -> float:
        return float(self.arrays["loss"])

    @property
    def inputs(self) -> Inputs:
        """What the model reads; of an encoder-decoder, the encoder."""
        names = ("tokens", "positions", "segments")
        types = jnp.asarray(self.arrays["types"]) if "types" in self.arrays else None
        return Inputs(*(jnp.asarray(self.arrays[n]) for n in names), types)

    @property
    def decoder_inputs(self) -> Inputs:
        """What an encoder-decoder's decoder reads."""
        names = ("decoder_tokens", "decoder_positions", "decoder_segments")
        return Inputs(*(jnp.asarray(self.arrays[n]) for n in names))

    @property
    def predicted(self) -> Inputs:
        """Where the logits stand."""
        return self.inputs if self.spec.encoder is None else self.decoder_inputs


OUTPUTS = ("logits", "hidden", "nsp", "pooled", "task")


def load_golden(name: str, directory: Path = Path(__file__).parent / "golden") -> Golden:
    with np.load(directory / f"{name}.npz") as file:
        content = dict(file)
    by_kind: dict[str, dict[str, np.ndarray]] = {"tensor": {}, "gradient": {}, "": {}}
    for key, array in content.items():
        kind, _, rest = key.rpartition(":")
        by_kind[kind][rest] = array
    config = json.loads(str(by_kind[""].pop("config")))
    return Golden(name, config, read_config(config), by_kind["tensor"], by_kind["gradient"], by_kind[""])
