"""The exchange of rows between the devices of experts: both forms, with and without further rounds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmx.kernels import expert_exchange
from lmx.kernels.expert_exchange import through_experts
from lmx.kernels.grouped_matmul import grouped_matmul
from lmx.sharding.mesh import MeshConfig, build_mesh

DEVICES, ROWS, EXPERTS, WIDTH = 4, 12, 8, 3


def emulated(operand: Any, output: Any, starts: Any, sizes: Any, places: Any, arrivals: Any, *, axis_name: Any) -> Any:
    """What the documentation of ``jax.lax.ragged_all_to_all`` says that it does, from gathers: for CPU."""
    gathered = [jax.lax.all_gather(a, axis_name) for a in (operand, starts, sizes, places)]
    devices, me = gathered[0].shape[0], jax.lax.axis_index(axis_name)
    each = starts.size // devices
    own = np.arange(output.shape[0])
    for source in range(devices):
        rows, start, size, place = (a[source] for a in gathered)
        for i in range(each):
            at = me * each + i
            offset = own - place[at]
            comes = (offset >= 0) & (offset < size[at])
            output = jnp.where(comes[:, None], rows.at[start[at] + offset].get(mode="clip"), output)
            # A receiver is told the same sizes as the senders.
            output = jnp.where(arrivals[source * each + i] == size[at], output, jnp.nan)
    return output


def loads(kind: str) -> np.ndarray:
    """The chosen expert of each row [devices, rows], sorted; EXPERTS for nobody's."""
    rng = np.random.default_rng(3)
    chosen = {
        "fair": rng.integers(0, EXPERTS, (DEVICES, ROWS)),
        "one expert": np.full((DEVICES, ROWS), 5),
        "with padding": rng.integers(0, EXPERTS + 4, (DEVICES, ROWS)).clip(max=EXPERTS),
        "one idle device": np.where(np.arange(DEVICES)[:, None] == 2, EXPERTS, rng.integers(0, 3, (DEVICES, ROWS))),
    }[kind]
    return np.sort(chosen, axis=1)


def apply(params: Any, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    return jnp.sin(grouped_matmul(rows, params, sizes))


@functools.cache
def compiled(slack: float, ragged: bool) -> Any:
    mesh = build_mesh(MeshConfig(data=1, expert=DEVICES), jax.devices()[:DEVICES])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    def exchanged(params: Any, x: Any, chosen: Any) -> Any:
        sizes = jnp.bincount(chosen[0], length=EXPERTS)
        form = {"axes": ("expert",), "most": ROWS, "slack": slack, "ragged": ragged}
        return through_experts(apply, params, x[0], sizes, **form)[None]

    def total(params: Any, x: Any, chosen: Any, weights: Any) -> Any:
        y = exchanged(params, x, chosen)
        return (weights * y).sum(), y

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def alone(params: Any, x: Any, chosen: Any, weights: Any) -> Any:
    def total(params: Any, x: Any) -> Any:
        every = jnp.sin(jnp.einsum("nrd,edo->nreo", x, params))
        chosen_one = jax.nn.one_hot(chosen, EXPERTS)
        y = jnp.einsum("nreo,nre->nro", every, chosen_one)
        return (weights * y).sum(), y

    return jax.value_and_grad(total, (0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize("kind", ["fair", "one expert", "with padding", "one idle device"])
@pytest.mark.parametrize("slack", [0.4, 9.0], ids=["rounds", "one round"])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_values_and_gradients(ragged: bool, slack: float, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_exchange, "ROOM", 1)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    rng, chosen = np.random.default_rng(0), loads(kind)
    params, x = rng.normal(size=(EXPERTS, WIDTH, 5)), rng.normal(size=(DEVICES, ROWS, WIDTH))
    weights = rng.normal(size=(DEVICES, ROWS, 5))
    arrays = [jnp.asarray(a, jnp.float32) for a in (params, x)]
    ours = compiled(slack, ragged)(*arrays, chosen, weights)
    theirs = alone(*arrays, chosen, jnp.asarray(weights, jnp.float32))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_buffers_are_as_large_as_the_slack_says() -> None:
    shapes: list[int] = []

    def noted(params: Any, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        shapes.append(rows.shape[0])
        return rows

    mesh = build_mesh(MeshConfig(data=1, expert=8))
    body = functools.partial(through_experts, noted, axes=("expert",), most=4096, slack=1.5, ragged=False)
    region = jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    arguments = [jax.ShapeDtypeStruct(s, "float32") for s in ((8, 1), (8 * 4096, 2))]
    jax.eval_shape(region, *arguments, jax.ShapeDtypeStruct((8 * 16,), "int32"))
    assert set(shapes) == {1.5 * 4096}
