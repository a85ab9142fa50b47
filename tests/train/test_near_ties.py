"""Rows whose experts rounding would choose: found where they are, and emptied."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.errors import UserError
from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.mixtral import Mixtral
from lmx.nn.moe import Moe
from lmx.nn.router import Router, SigmoidRouter, SoftmaxRouter
from lmx.train.check_mesh import random_rows
from lmx.train.near_ties import AskingMoe, asking, emptied, emptier
from lmx.train.state import init_state

SIZES: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "hidden": 16}
MIXTRAL = Experiment(model=Mixtral(vocab=64, context=32, experts=4, **SIZES), train=TrainConfig(batch=6, length=16))


@pytest.mark.parametrize(
    ("router", "logits", "expected"),
    [
        (SoftmaxRouter(k=2), [0.0, 3.0, 1.0, 2.5], 1.5),
        (SoftmaxRouter(k=4), [0.0, 3.0, 1.0, 2.5], np.inf),
        (SigmoidRouter(k=1), [0.0, np.log(3), -np.log(3), -9.0], 0.25),
        # The groups' sums are 1.25 and 0.75, the best scores of the first group 0.75 and 0.5.
        (SigmoidRouter(k=1, groups=2, top_groups=1), [0.0, np.log(3), 0.0, -np.log(3)], 0.25),
    ],
)
def test_margins(router: Router, logits: list[float], expected: float) -> None:
    assert float(router.margin(jnp.array(logits), None)) == pytest.approx(expected)


def test_a_correction_moves_margins() -> None:
    router, correction = SigmoidRouter(k=1), jnp.array([0.2, 0.0, 0.0])
    assert float(router.margin(jnp.array([0.0, np.log(3), -9.0]), correction)) == pytest.approx(0.05, rel=1e-4)


def test_every_mixture_of_a_spec_is_asked() -> None:
    sublayers = [s for block in asking(MIXTRAL.model.spec()).stack.blocks() for s in block.sublayers]
    assert [type(s) for s in sublayers if isinstance(s, Moe)] == [AskingMoe]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_row_with_a_tie_is_emptied(accumulate: int) -> None:
    """A token whose embedding is zero has no preference; it stands in row 3 alone."""
    experiment = replace(MIXTRAL, train=replace(MIXTRAL.train, accumulate=accumulate))
    params = init_state(experiment, jax.random.key(0)).params
    params["embedding"]["table"] = params["embedding"]["table"].at[63].set(0)
    for name in ("value", "out"):
        attention = params["stack"]["segment_0"]["block_0"]["attention"]
        attention[name] = jax.tree.map(jnp.zeros_like, attention[name])
    rows = random_rows(experiment, 0)
    rows["tokens"] = np.where(rows["tokens"] == 63, 1, rows["tokens"])
    rows["tokens"][3, 2] = 63
    kept, count = emptier(experiment)(params, rows, None)
    assert count == 1
    for name, array in kept.items():
        np.testing.assert_array_equal(array[[0, 1, 2, 4, 5]], rows[name][[0, 1, 2, 4, 5]])
        assert not array[3].any()


def test_models_without_experts_keep_all_rows() -> None:
    rows = random_rows(Experiment(train=TrainConfig(batch=2, length=16)), 0)
    assert emptier(Experiment())({}, rows, None) == (rows, 0)


def test_no_row_left_is_said() -> None:
    with pytest.raises(UserError, match="every row has a token whose experts are within 1e-05 of a tie"):
        emptied({"tokens": np.ones((2, 4), np.int32)}, np.array([True, True]))
