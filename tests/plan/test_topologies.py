import importlib.util

import jax
import pytest
from jax.experimental import topologies

from lmx.errors import UserError
from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.llama import Llama
from lmx.plan.compile import compile_step, sharding_on
from lmx.plan.topologies import topology_devices
from lmx.sharding.mesh import MeshConfig


def test_virtual_devices() -> None:
    assert list(topology_devices("cpu:4")) == jax.devices()[:4]
    assert len(topology_devices("cpu:2", slices=2)) == 4


@pytest.mark.parametrize("name", ["v5p", "8", "v5p:2x2x", "cpu:0", "cpu:64", "h100:8"])
def test_unknown_topologies(name: str) -> None:
    with pytest.raises(UserError, match=r"--topology"):
        topology_devices(name)


def test_a_tpu_takes_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu; pip install 'lmx\[tpu\]'"):
        topology_devices("v5p:2x2x2")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("ABORTED: Internal error when accessing libtpu multi-process lockfile.", "another process"),
        ("?", "no topology"),
    ],
)
def test_what_libtpu_says_is_told(said: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**kwargs: object) -> None:
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=told):
        topology_devices("v5p:2x2x2")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_tpu_slices() -> None:
    devices = topology_devices("v5p:2x2x2")
    assert len(devices) == 8
    assert devices[0].platform == "tpu"
    with pytest.raises(UserError, match="knows no topology v99:2x2"):
        topology_devices("v99:2x2")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_pipeline_across_slices_hands_on_over_the_data_centre_network() -> None:
    model = Llama(vocab=256, context=128, layers=4, width=256, heads=2, kv_heads=2, head_dim=128, hidden=512)
    train, mesh = TrainConfig(batch=8, length=128), MeshConfig(data=1, fsdp=4, stage=2)
    base = Experiment(model=model, train=train, mesh=mesh)
    step = compile_step(base, sharding_on(base, topology_devices("v5p:2x2x1", slices=2)), effort=-1.0)
    assert step.mesh["stage"] == 2
    assert {collective.axes for collective in step.collectives} == {("fsdp",)}  # within a slice; no other is counted
