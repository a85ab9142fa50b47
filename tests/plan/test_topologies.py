import importlib.util

import jax
import pytest
from jax.experimental import topologies

from lmx.errors import UserError
from lmx.plan.topologies import topology_devices


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
