"""What a compiled step sends is what the formula of its kind of parallelism says."""

import functools
from dataclasses import replace

import jax
import pytest

from lmx.errors import UserError
from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.llama import Llama
from lmx.models.families.mixtral import Mixtral
from lmx.models.schedules import PipelineConfig
from lmx.nn.dispatch import Dropless
from lmx.plan.communication import Term, compared, expected
from lmx.plan.compile import compile_step, sharding_on
from lmx.sharding.collectives import bytes_by_axes
from lmx.sharding.mesh import MeshConfig

SIZES = {"vocab": 256, "context": 64, "width": 32, "heads": 8, "kv_heads": 8, "head_dim": 8, "hidden": 128}
LLAMA = Llama(layers=2, tied=False, **SIZES)
MIXTRAL = Mixtral(layers=2, experts=8, dispatch=Dropless(slack=1.0), **SIZES)
MESHES = {
    "data": (LLAMA, MeshConfig(data=4)),
    "tensor": (LLAMA, MeshConfig(data=1, tensor=4)),
    "sequence": (LLAMA, MeshConfig(data=1, sequence=4)),
    "expert": (MIXTRAL, MeshConfig(data=1, expert=4)),
    "stage": (LLAMA, MeshConfig(data=2, stage=2)),
}
GPIPE = PipelineConfig()


def experiment(kind: str, pipeline: PipelineConfig = GPIPE) -> Experiment:
    model, mesh = MESHES[kind]
    train = TrainConfig(batch=8, length=64, remat="none")
    return Experiment(model=model, mesh=mesh, train=train, pipeline=pipeline)


@functools.cache
def ratios(kind: str, pipeline: PipelineConfig = GPIPE) -> dict[str, float]:
    """Measured by formula, for each set of axes along which more than a hundredth is sent."""
    base = experiment(kind, pipeline)
    sharding = sharding_on(base, jax.devices()[:4])
    step = compile_step(base, sharding)
    assert step.devices == 4
    assert step.mesh[kind] == (2 if kind == "stage" else 4)
    assert step.state_bytes > 0 < step.working_bytes
    rows = compared(bytes_by_axes(step.collectives), expected(base, sharding))
    most = max(row.measured for row in rows)
    return {row.axes: row.measured / max(row.formula, 1) for row in rows if row.measured > most / 100}


MORE = {
    # XLA:CPU sums the gradients that query, key and value, and gate and up have for their input, after reducing each.
    "tensor": (2 * (2 + 5) + 2) / (2 * (2 + 2) + 2),
    # The numbers of rows for each expert, gathered before each exchange: not little beside rows of 32.
    "expert": 1.06,
}


@pytest.mark.parametrize("kind", ["data", "tensor", "expert", "sequence"])
def test_a_step_sends_what_the_formula_says(kind: str) -> None:
    found = ratios(kind)
    assert set(found) == {kind}
    assert found[kind] == pytest.approx(MORE.get(kind, 1), abs=0.05)


def test_a_pipeline_sums_gradients_over_the_batch_once_and_gathers_its_own_rows_only() -> None:
    found = ratios("stage")
    assert set(found) == {"data", "stage", "data+stage"}
    assert found["data"] == pytest.approx(1, abs=0.05)
    assert found["data+stage"] == pytest.approx(1, abs=0.05)
    assert 1 <= found["stage"] < 1.3  # the norms' and scalars' sums are not little here


def test_1f1b_sums_gradients_over_the_batch_once() -> None:
    found = ratios("stage", PipelineConfig("1f1b", microbatches=4))
    assert found["data"] < 1.5  # 8.4 where each tick sums them; what lies outside of the stages is not over both axes
    assert found["data+stage"] < 1


def test_formulas_by_hand() -> None:
    base = experiment("data")
    terms = expected(base, sharding_on(base, jax.devices()[:4]))
    weights = 2 * 256 * 32 + 2 * (4 * 32 * 64 + 3 * 32 * 128 + 2 * 32) + 32
    assert sum(term.bytes for term in terms) == pytest.approx(2 * 3 / 4 * 4 * weights)
    fsdp = replace(base, mesh=MeshConfig(data=1, fsdp=4))
    by_axes = {row.axes: row.formula for row in compared({}, expected(fsdp, sharding_on(fsdp, jax.devices()[:4])))}
    norms, tables = 5 * 32, 2 * 256 * 32
    assert by_axes["fsdp"] == pytest.approx(3 / 4 * 4 * (3 * (weights - norms - tables) + 2 * tables + 2 * norms))


def test_sides_are_joined_by_their_axes() -> None:
    terms = (Term(("data",), 10.0, "gradients"), Term(("data",), 5.0, "weights"), Term(("expert",), 1.0, "rows"))
    rows = compared({"data": 16, "data+fsdp": 40}, terms)
    assert [(r.axes, r.measured, r.formula) for r in rows] == [("data+fsdp", 40, 0), ("data", 16, 15), ("expert", 0, 1)]
    assert rows[1].what == "gradients, weights"


def test_what_formulas_do_not_cover_is_refused() -> None:
    base = experiment("data")
    base = replace(base, train=replace(base.train, accumulate=2))
    with pytest.raises(UserError, match=r"set train\.accumulate to 1"):
        expected(base, sharding_on(base, jax.devices()[:4]))
