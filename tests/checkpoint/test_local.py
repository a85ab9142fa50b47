"""The node-local tier: the newest good step of either tier, whole or not used, the same bits, on any mesh it holds."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmx.checkpoint import local as local_module
from lmx.checkpoint.checkpointer import Checkpointer
from lmx.checkpoint.config import CheckpointConfig
from lmx.checkpoint.loading import Restored
from lmx.checkpoint.local import LocalTier
from lmx.errors import LmxError, UserError

CONFIG = CheckpointConfig(local_directory="local", local_every=1)


def place(devices: int) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("x",)), PartitionSpec("x"))


def state(step: int, devices: int = 8) -> dict[str, Any]:
    """A split matrix, a split vector of a dtype of JAX's own, a replicated one, a scalar."""
    split = place(devices)
    whole = NamedSharding(split.mesh, PartitionSpec())
    matrix = jnp.arange(48, dtype=jnp.float32).reshape(16, 3) / 7 + step
    return {
        "matrix": jax.device_put(matrix, split),
        "layers": [jax.device_put(jnp.arange(8, dtype=jnp.bfloat16) + step, split)],
        "whole": jax.device_put(jnp.arange(5, dtype=jnp.int8), whole),
        "step": jax.device_put(jnp.int32(step), whole),
    }


def restore(root: Path, devices: int = 8) -> Restored:
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state(0, devices))
    with Checkpointer(root / "durable", CONFIG, LocalTier(str(root / "local"), "run")) as checkpointer:
        found = checkpointer.restore(target)
    assert found is not None
    return found


def assert_same(found: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.sharding) == (other.dtype, other.sharding)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A durable step 10, then local ones of 11, 12 and 13."""
    tier = LocalTier(str(tmp_path / "local"), "run")
    with Checkpointer(tmp_path / "durable", CONFIG, tier) as checkpointer:
        checkpointer.save(10, state(10), {"step": 10})
        for step in (11, 12, 13):
            tier.save(step, state(step), {"step": step})
    return tmp_path


def test_the_newest_step_of_either_tier_comes_back_bit_for_bit(saved: Path) -> None:
    found = restore(saved)
    assert (found.step, found.local, found.meta, found.skipped) == (13, True, {"step": 13}, ())
    assert_same(found.state, state(13))
    assert sorted(p.name for p in (saved / "local" / "run" / "process-0").iterdir()) == ["12", "13"]
    with Checkpointer(saved / "durable", CONFIG) as checkpointer:
        checkpointer.save(14, state(14), {"step": 14})
    found = restore(saved)
    assert (found.step, found.local) == (14, False)
    assert_same(found.state, state(14))


@pytest.mark.parametrize("devices", [4, 1])
def test_another_mesh_takes_it_where_all_shards_are_there(saved: Path, devices: int) -> None:
    found = restore(saved, devices)
    assert (found.step, found.local) == (13, True)
    assert_same(found.state, state(13, devices))


def test_damage_is_told_and_the_local_step_before_taken(saved: Path) -> None:
    file = saved / "local" / "run" / "process-0" / "13" / "shards.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 4
    file.write_bytes(data)
    found = restore(saved)
    assert (found.step, found.local) == (12, True)
    assert_same(found.state, state(12))
    ((step, reason),) = found.skipped
    assert step == 13
    assert "process-0: the content of shards.bin changed" in reason


def test_a_step_that_lacks_the_shards_of_a_replaced_node_is_passed_over(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = local_module._shards
    monkeypatch.setattr(local_module, "_shards", lambda a: dict(list(every(a).items())[:4]))  # of half the devices
    tier = LocalTier(str(saved / "local"), "run")
    for step in (14, 15):
        tier.save(step, state(step), {})
    tier.close()
    found = restore(saved)
    assert (found.step, found.local) == (10, False)
    assert [s for s, _ in found.skipped] == [15, 14]
    assert "lacks shards of layers/0 for this mesh" in found.skipped[0][1]


def test_shards_of_different_attempts_are_not_mixed(saved: Path) -> None:
    """Two processes wrote step 13 in different attempts: neither half is whole, together they would be wrong."""
    one = saved / "local" / "run" / "process-0" / "13" / "shards.json"
    two = saved / "local" / "run" / "process-1"
    (saved / "local" / "run" / "process-0").rename(two)
    content = json.loads((two / "13" / "shards.json").read_text())
    assert content["attempt"]
    tier = LocalTier(str(saved / "local"), "run")
    tier.save(13, state(13), {"step": 13})
    tier.close()
    assert json.loads(one.read_text())["attempt"] != content["attempt"]
    tier = LocalTier(str(saved / "local"), "run")
    assert {len(folders) for (step, _), folders in tier._found().items() if step == 13} == {1}


def test_it_serves_even_where_every_durable_step_is_damaged(saved: Path) -> None:
    for file in (saved / "durable" / "10" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert restore(saved).step == 13
    tier = LocalTier(str(saved / "local"), "run")
    tier.close(remove=True)
    with pytest.raises(LmxError, match="can be trusted"):
        restore(saved)


def test_a_write_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tier = LocalTier(str(tmp_path / "file"), "run")
    tier.save(1, state(1), {})
    with pytest.raises(LmxError, match=r"the local checkpoint of step 1 was not written in .*Not a directory"):
        tier.close()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"local_directory": "/ssd"}, "local_directory is /ssd, but checkpoint.local_every is not set"),
        ({"local_every": 5}, "local_every is 5, but checkpoint.local_directory is not set"),
        ({"local_directory": "gs://b/x", "local_every": 5}, "expected a path on each node's own disk"),
        ({"local_every": -1}, "local_every is -1, expected 0 or more"),
    ],
)
def test_half_a_configuration_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CheckpointConfig(**values)
