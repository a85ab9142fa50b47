"""What a compiler says of a step that no device can hold."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from lmx.errors import UserError
from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.gpt2 import Gpt2
from lmx.plan import compile as plan
from lmx.sharding.mesh import MeshConfig

TINY = Experiment(
    model=Gpt2(vocab=64, context=16, layers=1, width=16, heads=2),
    mesh=MeshConfig(data=1),
    train=TrainConfig(batch=8, length=16),
)
SAID = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, 431.89G exceed 95.74G.\nand a page of addresses"


def fails(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def refuse(options: Any) -> None:
        raise jax.errors.JaxRuntimeError(said)

    lowered = SimpleNamespace(compile=refuse)
    monkeypatch.setattr(plan, "jit_step", lambda *given: SimpleNamespace(lower=lambda *shapes: lowered))


def test_a_step_that_does_not_fit_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, SAID)
    sharding = plan.sharding_on(TINY, jax.devices()[:1])
    with pytest.raises(UserError) as raised:
        plan.compile_step(TINY, sharding)
    assert str(raised.value) == (
        "a step does not fit into the devices' memory (Ran out of memory on HBM, 431.89G exceed 95.74G): split it over "
        "more of them, lower --train.batch or --train.length, raise --train.accumulate, or set --train.remat full"
    )


def test_any_other_error_of_a_compiler_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, "INTERNAL: no such thing")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: no such thing"):
        plan.compile_step(TINY, plan.sharding_on(TINY, jax.devices()[:1]))
