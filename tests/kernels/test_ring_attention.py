"""Attention over a length that the mesh splits, against the float64 reference and against one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_attention import BUCKETS, learned, positions_of, reference

from lmx.errors import UserError
from lmx.kernels import attention as kernel
from lmx.kernels import itinerary
from lmx.kernels.itinerary import Trip, orders, plan
from lmx.kernels.masks import Bidirectional, BidirectionalWindow, Causal, Chunked, Mask, SlidingWindow
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding, use_sharding

BATCH, LENGTH, HEAD_DIM = 2, 32, 6
PACKED = np.array([[1] * 11 + [2] * 3 + [3] * 18, [1] * 5 + [2] * 21 + [0] * 6], np.int32)
REAL = PACKED > 0
KINDS = ["ring", "all_gather", "all_to_all"]
MASKS: list[Mask] = [
    *[Causal(), Bidirectional(), SlidingWindow(5), SlidingWindow(11), BidirectionalWindow(6), Chunked(6)],
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces a shard."""
    monkeypatch.setattr(itinerary, "PIECE_MAXIMUM", 4)
    monkeypatch.setattr(kernel, "BLOCK_MINIMUM", 5)


FOUR = MeshConfig(data=1, sequence=4)


def split(kind: Any, mesh: MeshConfig = FOUR) -> Sharding:
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.sequence * mesh.tensor]
    return Sharding(build_mesh(mesh, devices), Rules(sequence_attention=kind))


def drawn(heads: int = 4, kv_heads: int = 2, value_dim: int = HEAD_DIM, memory: int = LENGTH) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(heads * 10 + kv_heads), 3)
    sizes = [(LENGTH, heads, HEAD_DIM), (memory, kv_heads, HEAD_DIM), (memory, kv_heads, value_dim)]
    return tuple(jax.random.normal(k, (BATCH, *s)) for k, s in zip(keys, sizes, strict=True))


def attend(sharding: Sharding | None, query: Any, key: Any, value: Any, mask: Mask, **options: Any) -> jax.Array:
    """Self-attention of the packed rows, or with ``memory`` segments attention to those."""
    memory = options.pop("memory", None)
    to = PACKED if memory is None else memory
    places = {"query_segments": PACKED, "key_segments": to}
    places |= {"query_positions": positions_of(PACKED), "key_positions": positions_of(to)}
    places = {name: jnp.asarray(place) for name, place in places.items()}
    options |= {"bias": BUCKETS} if "bias_table" in options else {}
    with use_sharding(sharding):
        key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
        return kernel.attention(query, key, value, mask=mask, itself=memory is None, **places, **options)


def gradients(sharding: Sharding | None, arrays: Any, mask: Mask, own: Any = None, **options: Any) -> Any:
    """The output, and the gradients of a weighted sum of it over what is not padding."""
    own = own or {}
    shape = (*arrays[0].shape[:3], arrays[2].shape[-1])
    weights = jnp.where(REAL[:, :, None, None], jax.random.normal(jax.random.key(5), shape), 0)

    def total(*values: Any) -> Any:
        learned = dict(zip(own, values[3:], strict=True))
        out = attend(sharding, *values[:3], mask, **learned, **options)
        return (out * weights).sum(), out

    run = jax.jit(jax.value_and_grad(total, range(3 + len(own)), has_aux=True))
    (_, out), grads = run(*arrays, *own.values())
    return jax.device_get((out, grads))


def assert_same(got: Any, expected: Any) -> None:
    (out, grads), (whole, of_whole) = got, expected
    np.testing.assert_allclose(out[REAL], whole[REAL], atol=2e-6)
    for a, b in zip(grads, of_whole, strict=True):
        assert np.abs(b).max() > 0.01
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


@functools.cache
def packed(kind: str | None, mask: Mask) -> Any:
    """The output and the gradients of the packed rows, split that way or on one device."""
    return gradients(kind and split(kind), drawn(8, 2, value_dim=5), mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_equals_float64_reference(mask: Mask, kind: str) -> None:
    out, _ = packed(kind, mask)
    np.testing.assert_allclose(out[REAL], reference(*drawn(8, 2, value_dim=5), mask, PACKED)[REAL], atol=3e-6)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_gradients_equal_one_device(mask: Mask, kind: str) -> None:
    assert_same(packed(kind, mask), packed(None, mask))


@functools.cache
def one_device(kv_heads: int, value_dim: int, mask: Mask, names: tuple[str, ...], **options: float) -> Any:
    """What a mesh is compared with, of eight heads with parameters of these names."""
    return gradients(None, drawn(8, kv_heads, value_dim=value_dim), mask, learned(names, 8), **options)


BOTH = ("sinks", "bias_table")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_options_equal_one_device(shards: int, kind: str) -> None:
    sharding = split(kind, MeshConfig(data=1, sequence=shards))
    ours = gradients(sharding, drawn(8, 1, value_dim=5), Causal(), learned(BOTH, 8), softcap=2.0)
    assert_same(ours, one_device(1, 5, Causal(), BOTH, softcap=2.0))


@pytest.mark.parametrize("kind", KINDS)
def test_with_heads_and_batch_split_too(kind: str) -> None:
    for mesh in (MeshConfig(data=2, sequence=2, tensor=2), MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)):
        ours = gradients(split(kind, mesh), drawn(8, 4), SlidingWindow(9), learned(BOTH, 8))
        assert_same(ours, one_device(4, HEAD_DIM, SlidingWindow(9), BOTH))


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_of_another_length(kind: str) -> None:
    memory = np.array([[1] * 3 + [2] * 8 + [3] * 4 + [0], [2] * 3 + [1] * 10 + [0] * 3], np.int32)
    run = functools.partial(gradients, arrays=drawn(8, 4, memory=16), mask=Bidirectional(), memory=memory)
    assert_same(run(split(kind)), run(None))


def in_region(sharding: Sharding, arrays: Any, sinks: jax.Array, **options: Any) -> Any:
    """The output in a region that is manual over the sequence, as a pipeline's is: it gets local shards."""

    def local(query: Any, key: Any, value: Any, sinks: Any, at: Any, within: Any) -> jax.Array:
        places = {"query_positions": at, "key_positions": at, "query_segments": within, "key_segments": within}
        with use_sharding(sharding):
            key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
            return kernel.attention(query, key, value, mask=Causal(), itself=True, sinks=sinks, **places, **options)

    by = P(None, "sequence")
    specs = (by, by, by, P(), by, by)
    region = jax.shard_map(
        local, mesh=sharding.mesh, in_specs=specs, out_specs=by, axis_names={"sequence"}, check_vma=False
    )
    return region(*arrays, sinks, jnp.asarray(positions_of(PACKED)), jnp.asarray(PACKED))


@pytest.mark.parametrize("kind", KINDS)
def test_within_a_region_that_is_manual_already(kind: str) -> None:
    """The gradient of what is shared is summed by the region."""
    arrays, own = drawn(8, 4), learned(("sinks",), 8)
    weights = jnp.where(REAL[:, :, None, None], jax.random.normal(jax.random.key(5), arrays[0].shape), 0)
    run = lambda *a: (in_region(split(kind, MeshConfig(data=2, sequence=4)), a[:3], a[3]) * weights).sum()  # noqa: E731
    grads = jax.jit(jax.grad(run, range(4)))(*arrays, own["sinks"])
    for a, b in zip(grads, one_device(4, HEAD_DIM, Causal(), ("sinks",))[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


def test_dropout_within_a_region_is_one_devices() -> None:
    arrays, own = drawn(8, 4), learned(("sinks",), 8)
    options = {"dropout": 0.5, "dropout_key": jax.random.key(3)}
    got = jax.jit(lambda *a: in_region(split("ring"), a[:3], a[3], **options))(*arrays, own["sinks"])
    expected = jax.jit(lambda *a: attend(None, *a[:3], Causal(), sinks=a[3], **options))(*arrays, own["sinks"])
    np.testing.assert_allclose(got[REAL], expected[REAL], atol=2e-6)


@pytest.mark.parametrize("kind", ["ring", "all_gather"])
def test_a_shard_of_one_place_and_lengths_that_do_not_part(kind: str) -> None:
    """No zig-zag there, and still exact."""
    sharding = split(kind, MeshConfig(data=1, sequence=8))
    arrays = tuple(x[:, :24] for x in drawn())
    within = jnp.asarray(PACKED[:, :24])
    places = {"query_positions": positions_of(PACKED)[:, :24], "query_segments": within}
    places |= {"key_positions": places["query_positions"], "key_segments": within}
    with use_sharding(sharding):
        keys, values = arrays[1].transpose(0, 2, 3, 1), arrays[2].swapaxes(1, 2)
        run = jax.jit(functools.partial(kernel.attention, mask=Causal(), itself=True))
        out = run(arrays[0], keys, values, **jax.tree.map(jnp.asarray, places))
    expected = reference(*arrays, Causal(), PACKED[:, :24])
    real = PACKED[:, :24] > 0
    np.testing.assert_allclose(out[real], expected[real], atol=3e-6)


def test_bfloat16_keeps_its_dtype_and_is_near() -> None:
    arrays = drawn(8, 4)
    low = tuple(x.astype(jnp.bfloat16) for x in arrays)
    (out, grads), (exact, of_exact) = gradients(split("ring"), low, Causal()), gradients(None, arrays, Causal())
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out[REAL].astype(np.float32), exact[REAL], atol=0.05)
    for a, b in zip(grads, of_exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b, atol=0.1)


def test_all_to_all_says_which_heads_do_not_divide() -> None:
    with pytest.raises(UserError) as error:
        attend(split("all_to_all"), *drawn(6, 2), Causal())
    assert str(error.value) == (
        "all_to_all splits heads over 4 devices (4 of the sequence, 1 of the heads), which does not divide the 6 query "
        "heads; choose a mesh that divides them, or set rules.sequence_attention to ring or all_gather"
    )


def test_a_length_that_the_mesh_does_not_divide_says_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        attend(split("ring"), *(x[:, :30] for x in drawn()), Causal())
    assert str(error.value) == (
        "the mesh splits 'act_length' into 4 (mesh axes sequence), which does not divide the length 30; the nearest "
        "length that it divides is 32"
    )


def cost(mask: Mask | None, shards: int, gathered: bool = False) -> int:
    return plan(Trip(mask, shards, 2, 2, 8, gathered)).cost


def test_the_zigzag_halves_the_causal_work() -> None:
    """Of pairs of half shards: 4 a step without a mask; 3 of a shard's own, 2 of any other, under a causal one."""
    for shards in (2, 4, 5, 8):
        assert cost(None, shards) == cost(Bidirectional(), shards) == 4 * shards
        assert plan(Trip(Causal(), shards, 2, 2, 8, False)).zigzag
        assert cost(Causal(), shards) == 3 + 2 * (shards - 1)
        assert cost(Causal(), shards, gathered=True) == 2 * shards + 1


def test_a_window_takes_only_the_hops_that_it_reaches() -> None:
    """Shards of 16 places."""
    offsets = lambda mask: [s.offset for s in plan(Trip(mask, 8, 2, 2, 8, False)).steps]  # noqa: E731
    assert offsets(SlidingWindow(17)) == [0, 1]
    assert offsets(SlidingWindow(18)) == [0, 1, 2]
    assert offsets(Chunked(4)) == [0, 1]
    assert offsets(BidirectionalWindow(16)) == [0, 1, 7]
    assert not plan(Trip(SlidingWindow(17), 8, 2, 2, 8, False)).zigzag


@pytest.mark.parametrize(("shards", "pieces"), [(1, 2), (3, 2), (4, 4), (4, 1)])
def test_orders_hold_every_piece_once(shards: int, pieces: int) -> None:
    for order in orders(shards, pieces):
        assert sorted(order.ravel().tolist()) == list(range(shards * pieces))
        assert order.shape == (shards, pieces)
