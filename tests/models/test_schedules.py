"""The numbers of a pipeline's schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.errors import UserError
from lmx.models.families.gemma3_text import Gemma3Text
from lmx.models.families.llama import Llama
from lmx.models.pipeline import chunked, cut, unchunked, uncut
from lmx.models.schedules import PipelineConfig, Plan, check_pipeline, make_plan, stages
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding, use_sharding


def sharding(**sizes: int) -> Sharding:
    mesh = MeshConfig(**{"data": 1, **sizes})
    return Sharding(build_mesh(mesh, jax.devices()[: int(np.prod(list(vars(mesh).values())))]), Rules())


def test_bubbles_are_those_of_the_papers() -> None:
    assert Plan("gpipe", 4, 1, 8).bubble == pytest.approx(3 / 11)
    assert Plan("circular", 4, 2, 8).bubble == pytest.approx(3 / 19)
    assert Plan("1f1b", 4, 1, 8).bubble == pytest.approx(6 / 14)
    assert str(Plan("circular", 2, 3, 8)) == ("pipeline circular: 2 stages, 3 chunks each, 8 microbatches, bubble 4.0%")


@pytest.mark.parametrize(("batch", "expected"), [(64, 8), (24, 6), (12, 6), (6, 3), (2, 1)])
def test_microbatches_are_four_a_stage_or_what_divides(batch: int, expected: int) -> None:
    assert make_plan(PipelineConfig(), sharding(data=2, stage=2), batch).microbatches == expected


def test_the_circular_schedule_has_a_microbatch_for_each_stage() -> None:
    config = PipelineConfig("circular")
    assert make_plan(config, sharding(stage=4), 6).microbatches == 6
    with pytest.raises(UserError, match=r"at least one microbatch for each of the 4 stages.* a multiple of 8"):
        make_plan(config, sharding(stage=4, data=2), 4)


@pytest.mark.parametrize("wrong", [PipelineConfig(microbatches=-1), PipelineConfig("circular", chunks=0)])
def test_numbers_below_their_least_are_refused(wrong: PipelineConfig) -> None:
    with pytest.raises(UserError, match="expected at least"):
        make_plan(wrong, sharding(stage=2), 8)


def test_1f1b_turns_around_after_its_last_layer() -> None:
    """Layers of another kind behind the longest segment: any other schedule runs them outside."""
    sizes: dict[str, Any] = {"vocab": 64, "context": 8, "width": 8, "heads": 2, "kv_heads": 1}
    sizes |= {"head_dim": 4, "hidden": 8}
    spec = Gemma3Text(layers=14, **sizes).spec()
    assert len(spec.stack.segments) == 2
    assert check_pipeline(PipelineConfig(), sharding(stage=2), spec, 8) == Plan("gpipe", 2, 1, 8)
    with pytest.raises(UserError, match=r"set pipeline.schedule to gpipe or circular"):
        check_pipeline(PipelineConfig("1f1b"), sharding(stage=2), spec, 8)


def test_one_stage_is_no_pipeline() -> None:
    spec = Llama(vocab=64, context=8, layers=3, width=8, heads=2, kv_heads=1, head_dim=4, hidden=8).spec()
    assert check_pipeline(PipelineConfig(microbatches=5), sharding(data=2), spec, 8) is None
    assert stages() == 1
    with use_sharding(sharding(stage=2)):
        assert stages() == 2


def test_layers_and_rows_come_back_in_their_order() -> None:
    plan = Plan("circular", 2, 3, 4)
    layers = jnp.arange(12)
    parts = chunked(plan, layers)
    assert parts.tolist() == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]
    assert unchunked(parts).tolist() == layers.tolist()
    rows = jnp.arange(8)
    assert cut(plan, rows).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert uncut(cut(plan, rows)).tolist() == rows.tolist()
