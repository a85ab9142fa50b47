import jax
import numpy as np
import pytest

from lmx.models.families.llama import Llama
from lmx.models.model import init_params
from lmx.nn.position import Rope

MODEL = Llama(
    vocab=96, context=16, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, hidden=32, rope=Rope(500.0), tied=True
)


@pytest.fixture(scope="session")
def model():
    return MODEL


@pytest.fixture(scope="session")
def base():
    """A model's parameters."""
    return jax.jit(lambda key: init_params(MODEL.spec(), key))(jax.random.key(0))


@pytest.fixture(scope="session")
def batch():
    tokens = np.random.default_rng(0).integers(0, 96, (8, 17)).astype(np.int32)
    ones = np.ones((8, 16), np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)).copy()
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones, "positions": positions}
