import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AxisType

from lmx.errors import UserError
from lmx.sharding.mesh import MeshConfig, build_mesh


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1, 1, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (1, 2, 2, 1, 1, 1, 2)),
        (MeshConfig(data=1, fsdp=2, tensor=4), (1, 1, 2, 1, 1, 1, 4)),
        (MeshConfig(fsdp=-8, tensor=-3), (1, 1, 8, 1, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=-6), (1, 1, 2, 1, 1, 1, 4)),
        (MeshConfig(slice=2, data=-1, expert=2, sequence=2), (2, 1, 1, 1, 2, 2, 1)),
    ],
)
def test_sizes_fill_the_devices(config, sizes):
    assert tuple(config.sizes(8).values()) == sizes
    mesh = build_mesh(config)
    assert mesh.devices.shape == sizes
    assert mesh.axis_names == ("slice", "data", "fsdp", "stage", "expert", "sequence", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_of_some_devices():
    assert build_mesh(MeshConfig(), jax.devices()[:3]).devices.shape == (1, 3, 1, 1, 1, 1, 1)


MESH_BETWEEN = """
import sys, jax
from lmx.sharding.mesh import MeshConfig, build_mesh
jax.jit(lambda x: x + 1)(1.0)
build_mesh(MeshConfig(), jax.devices()[: int(sys.argv[1])])
jax.jit(lambda x: x + 2)(1.0)
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_compiled_for_several_cpu_devices_is_cached_where_it_keeps_its_order(devices: int, tmp_path: Path):
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", MESH_BETWEEN, str(devices)], env=env, check=True)
    forgets = devices > 1 and version("jaxlib").startswith("0.10.")
    assert len(list(tmp_path.glob("*-cache"))) == (1 if forgets else 2)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            MeshConfig(fsdp=0),
            "mesh.fsdp is 0; each axis is at least 1, or at most one of them -1 for 'the rest'",
        ),
        (
            MeshConfig(data=-1, tensor=-1),
            "mesh.data and mesh.tensor are -1; each axis is at least 1, or at most one of them -1 for 'the rest'",
        ),
        (
            MeshConfig(data=2, fsdp=2, tensor=4),
            "the mesh data 2 x fsdp 2 x tensor 4 takes 16 devices, but there are 8; "
            "choose sizes whose product is 8 (the nearest: data 1 x fsdp 2 x tensor 4), or set one axis to -1",
        ),
        (
            MeshConfig(data=2, fsdp=1, tensor=1),
            "the mesh data 2 takes 2 devices, but there are 8; "
            "choose sizes whose product is 8 (the nearest: data 8), or set one axis to -1",
        ),
        (
            MeshConfig(fsdp=3),
            "the mesh fsdp 3 takes a multiple of 3 devices, but there are 8; "
            "choose sizes whose product is 8 (the nearest: fsdp 4), or set one axis to -1",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_says_why(config, sentence):
    with pytest.raises(UserError) as error:
        config.sizes(8)
    assert str(error.value) == sentence


@dataclass(frozen=True)
class Chip:
    """A TPU chip that is not there."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


def chips(slices: int) -> list[Any]:
    places = itertools.product(range(slices), range(4), range(4), range(4))
    return [Chip(i, (x, y, z), s) for i, (s, z, y, x) in enumerate(places)]


def test_axes_may_split_those_of_the_machine() -> None:
    mesh = build_mesh(MeshConfig(data=8, tensor=8), chips(1))
    assert mesh.shape["data"] == mesh.shape["tensor"] == 8
    assert len({chip.id for chip in mesh.devices.flat}) == 64


def test_slices_are_the_outermost_axis() -> None:
    mesh = build_mesh(MeshConfig(slice=2, data=8, tensor=8), chips(2))
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]


def test_a_pipeline_goes_across_slices() -> None:
    mesh = build_mesh(MeshConfig(data=8, stage=4, tensor=4), chips(2))
    assert mesh.axis_names[0] == "stage"
    assert [{chip.slice_index for chip in stage.flat} for stage in mesh.devices] == [{0}, {0}, {1}, {1}]
    both = build_mesh(MeshConfig(slice=2, data=8, stage=2, tensor=8), chips(4))
    assert both.axis_names[:2] == ("slice", "stage")
    places = both.devices.reshape(4, 64)
    assert [{chip.slice_index for chip in place} for place in places] == [{0}, {1}, {2}, {3}]


@pytest.mark.parametrize("config", [MeshConfig(data=16, tensor=8), MeshConfig(slice=4, data=8, tensor=4)])
def test_what_does_not_cover_the_slices_is_refused(config: MeshConfig) -> None:
    with pytest.raises(
        UserError, match=r"in 2 slices, but mesh.slice is \d and mesh.stage 1; set mesh.slice to 2, or to 1 and"
    ):
        build_mesh(config, chips(2))
