"""Tiny lively models of each kind, with tokenizers, that were never saved; a plain log-softmax."""

from typing import Any

import jax
import numpy as np
import pytest

from lmx.data.tokenizer import train_bpe
from lmx.decode.loaded import Model
from lmx.models.config import ModelConfig
from lmx.models.families.bert import Bert
from lmx.models.families.llama import Llama
from lmx.models.families.t5 import T5
from lmx.models.model import param_axes
from lmx.nn.position import Rope
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding
from tests.jitted import init_params

TEXT = "the quick brown fox jumps over the lazy dog while three hundred small birds sing in the old garden. "
CONTEXT = 96
SIZES = {"vocab": 320, "context": CONTEXT, "width": 32, "heads": 4, "hidden": 64}


def made(config: ModelConfig, *, before: bool = True) -> Model:
    """A model with random, lively parameters: its predictions are far from even."""
    tokenizer = train_bpe(iter([TEXT * 20]), 320, ("[MASK]",)).with_end_token(before=before)
    params = init_params(config.spec(), jax.random.key(3))
    lively = jax.tree.map(lambda a: np.asarray(a) * np.float32(6) if a.ndim > 1 else a, params)
    return Model(config, jax.device_put(lively), tokenizer)


@pytest.fixture(scope="session")
def decoder() -> Model:
    return made(Llama(**SIZES, layers=2, kv_heads=2, head_dim=8, rope=Rope(500.0)))


@pytest.fixture(scope="session")
def encoder() -> Model:
    return made(Bert(**SIZES, layers=2, pooler=False), before=False)


@pytest.fixture(scope="session")
def encoder_decoder() -> Model:
    return made(T5(**SIZES, encoder_layers=1, decoder_layers=2, head_dim=8), before=False)


@pytest.fixture(scope="session")
def classifier() -> Model:
    return made(Bert(**SIZES, layers=1, task="sequence_classification", classes=2), before=False)


@pytest.fixture(scope="session")
def on_mesh(decoder: Model) -> Model:
    """The decoder, spread over eight devices."""
    sharding = Sharding(build_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), Rules())
    params = jax.device_put(decoder.params, sharding.tree(param_axes(decoder.spec)))
    return Model(decoder.config, params, decoder.tokenizer, sharding=sharding)


def log_softmax(scores: Any) -> np.ndarray:
    """In float64."""
    scores = np.asarray(scores, np.float64)
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
