"""One bad layer of several is named exactly, whatever it spoils after and before it."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.gemma2 import Gemma2
from lmx.models.families.gpt2 import Gpt2
from lmx.models.families.t5 import T5
from lmx.objectives.denoising import SpanCorruption
from lmx.objectives.random_rows import full_rows
from lmx.optim.names import name_of
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Sharding
from lmx.train.diagnosis import _parts, first_not_finite
from lmx.train.state import TrainState, init_state

TRAIN = TrainConfig(batch=8, length=16, remat="none")
DECODER = Experiment(model=Gpt2(vocab=64, context=16, layers=4, width=16, heads=2), train=TRAIN)
BOTH = Experiment(
    model=T5(128, 32, encoder_layers=2, decoder_layers=2, width=16, heads=2, head_dim=8, hidden=16),
    objective=SpanCorruption(target_length=8),
    train=TRAIN,
)
BLOCK = "stack/segment_0/block_0"


@functools.cache
def fresh(experiment: Experiment) -> TrainState:
    return jax.jit(functools.partial(init_state, experiment))(jax.random.key(0))


def spoiled(experiment: Experiment, changes: dict[str, tuple[int, float]]) -> TrainState:
    """A fresh state with one row of some parameters set to a number."""

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.at[changes[name][0]].set(changes[name][1]) if (name := name_of(path)) in changes else leaf

    state = fresh(experiment)
    return replace(state, params=jax.tree.map_with_path(one, state.params))


@pytest.mark.parametrize(
    ("experiment", "changes", "expected"),
    [
        (DECODER, {}, "everything is finite"),
        (DECODER, {"embedding/position": (3, np.nan)}, "the first output that is not finite is that of the embedding"),
        (
            DECODER,
            {f"{BLOCK}/mlp/down/kernel": (2, np.inf)},
            f"the first output that is not finite is that of layer 2 (row 2 of {BLOCK}/*); "
            f"parameters that are not finite: {BLOCK}/mlp/down/kernel",
        ),
        (DECODER, {"final_norm/bias": (0, np.nan)}, "the outputs of all layers are finite, the loss is not"),
        (  # GELU's derivative overflows, and the product with it is not a number for all layers before, too
            DECODER,
            {f"{BLOCK}/mlp/up/bias": (1, 3e38), f"{BLOCK}/mlp/down/kernel": (1, 0.0)},
            f"going backward the first gradient that is not is that of layer 1 (row 1 of {BLOCK}/*)",
        ),
        (
            BOTH,
            {f"encoder/{BLOCK}/mlp/down/kernel": (1, np.inf)},
            f"not finite is that of the encoder's layer 1 (row 1 of encoder/{BLOCK}/*)",
        ),
        (
            BOTH,
            {f"{BLOCK}/mlp/down/kernel": (0, np.inf)},
            f"not finite is that of the decoder's layer 0 (row 0 of {BLOCK}/*)",
        ),
    ],
)
def test_the_first_part_that_is_not_finite_is_named(
    experiment: Experiment, changes: dict[str, tuple[int, float]], expected: str
) -> None:
    rows = full_rows(experiment.objective, experiment.model.spec(), 8, 16)
    sharding = Sharding(build_mesh(MeshConfig(data=1), jax.devices()[:1]), experiment.rules)
    batch = jax.tree.map(jnp.asarray, rows)
    assert expected in first_not_finite(experiment, sharding, spoiled(experiment, changes), batch, 0)


def test_layers_are_counted_through_segments_and_patterns() -> None:
    spec = Gemma2(vocab=64, context=16, layers=4, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16).spec()
    layers = [part.label for part in _parts(spec) if part.repeat is not None]
    assert layers[1:3] == [
        "layer 1 (row 0 of stack/segment_0/block_1/*)",
        "layer 2 (row 1 of stack/segment_0/block_0/*)",
    ]
    assert len(layers) == 4
