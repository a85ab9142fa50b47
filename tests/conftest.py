"""What every test shares: 8 virtual CPU devices, caches of their own, and tiny models."""

# ruff: noqa: E402

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "jax-compiled"
# Before JAX is imported, and for the processes that tests start too. The second flag halves the time to compile.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.checkpoint.huggingface import import_tensors, read_config
from lmx.models.config import ModelConfig
from lmx.models.specs import ModelSpec
from lmx.nn.module import Params


@pytest.fixture(scope="session", autouse=True)
def own_data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMX_CACHE", str(tmp_path_factory.mktemp("lmx-cache")))
        yield Path(os.environ["LMX_CACHE"])


@dataclass(frozen=True)
class Golden:
    """A tiny random model of tests/golden, with the outputs that transformers computes for it."""

    config_json: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    tokens: np.ndarray
    logits: np.ndarray
    loss: float

    @property
    def spec(self) -> ModelSpec:
        return self.config.spec()

    @functools.cached_property
    def params(self) -> Params:
        return cast(Params, jax.tree.map(jnp.asarray, import_tensors(self.config, self.tensors)))


def load_golden(name: str) -> Golden:
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        content = dict(file)
    by_kind = {
        kind: {key.partition(":")[2]: a for key, a in content.items() if key.startswith(f"{kind}:")}
        for kind in ("tensor", "gradient")
    }
    config = json.loads(str(content["config"]))
    outputs = {"tokens": content["tokens"], "logits": content["logits"], "loss": float(content["loss"])}
    return Golden(config, read_config(config), by_kind["tensor"], by_kind["gradient"], **outputs)


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each tiny model in turn."""
    return load_golden(request.param)


@pytest.fixture(scope="session")
def gpt2() -> Golden:
    """Learned positions, biases, a tied table."""
    return load_golden("gpt2")


@pytest.fixture(scope="session")
def llama() -> Golden:
    """Rotary positions, grouped queries, a table of its own."""
    return load_golden("llama")
