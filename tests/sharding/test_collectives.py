"""Bytes of collectives: of small programs whose traffic a formula gives, and of lines as compilers write them."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.errors import LmxError
from lmx.sharding.collectives import Collective, bytes_by_axes, collectives
from lmx.sharding.replica_groups import replica_groups

SHAPE = {"a": 2, "b": 2, "c": 2}
X = jnp.zeros((16, 4))
B = 16 * 4 * 4
"""The bytes of X, which every device holds whole."""


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), tuple(SHAPE), axis_types=(AxisType.Auto,) * 3)


def of(f: Callable[..., Any]) -> list[Collective]:
    """The collectives of a function of X, run on every device."""
    mapped = jax.shard_map(f, mesh=mesh(), in_specs=P(), out_specs=P(), check_vma=False)
    return collectives(jax.jit(mapped).lower(X).compile().as_text(), SHAPE)


@pytest.mark.parametrize("axes", ["a", "b", "c", ("a", "b"), ("a", "c"), ("a", "b", "c")])
def test_a_sum_over_each_axis(axes: Any) -> None:
    n = 2 ** len(axes)
    assert of(lambda x: jax.lax.psum(x, axes)) == [Collective("all-reduce", tuple(axes), n, 2 * (n - 1) / n * B, 1)]


def test_each_kind_once() -> None:
    def f(x: jax.Array) -> Any:
        gathered = jax.lax.all_gather(x, ("b", "c"), tiled=True)
        swapped = jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])
        scattered = jax.lax.psum_scatter(x, ("a", "c"), tiled=True)
        return gathered, swapped, scattered, jax.lax.all_to_all(x, "b", 0, 1, tiled=True)

    expected = {
        Collective("all-gather", ("b", "c"), 4, 3 * B, 1),
        Collective("collective-permute", ("a",), 2, B, 1),
        Collective("reduce-scatter", ("a", "c"), 4, 3 / 4 * B, 1),
        Collective("all-to-all", ("b",), 2, B / 2, 1),
    }
    assert set(of(f)) == expected


def test_loops_count_as_often_as_they_run() -> None:
    def inner(x: jax.Array, _: Any) -> Any:
        return jax.lax.ppermute(x, "c", [(0, 1), (1, 0)]), None

    def outer(x: jax.Array, _: Any) -> Any:
        x = x + jax.lax.all_gather(x, "b").sum(0)
        return jax.lax.scan(inner, x, None, length=3)[0], None

    found = of(lambda x: jax.lax.scan(outer, x, None, length=5)[0])
    assert {(c.kind, c.times) for c in found} == {("all-gather", 5), ("collective-permute", 15)}
    assert bytes_by_axes(found) == {"c": 15 * B, "b": 5 * B}


def test_a_loop_that_does_not_tell_its_length_is_refused() -> None:
    def f(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: jax.lax.psum(x, "a"), x)

    with pytest.raises(LmxError, match=r"the loop with the condition \S+ has collectives, but does not tell"):
        of(f)


def test_what_the_compiler_partitions() -> None:
    """A product contracted over ``c`` is summed along it; half of it, along ``b``, is on each device."""
    rows, columns = NamedSharding(mesh(), P("b", "c")), NamedSharding(mesh(), P("c"))
    x, y = jax.device_put(jnp.zeros((8, 16)), rows), jax.device_put(jnp.zeros((16, 32)), columns)
    product = jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh(), P("b")))
    found = collectives(product.lower(x, y).compile().as_text(), SHAPE)
    assert bytes_by_axes(found) == {"c": 4 * 32 * 4}


TPU = """
%cond (p: (s32[], f32[256,1024])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7), metadata={op_name="jit(f)/while"}
  %p = (s32[]{:T(128)}, f32[256,1024]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%inside (q: bf16[8,128]) -> bf16[2,128] {
  %q = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %r = bf16[2,128]{1,0:T(8,128)(2,1)} reduce-scatter(%q), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%body (p.1: (s32[], f32[256,1024])) -> (s32[], f32[256,1024]) {
  %p.1 = (s32[]{:T(128)}, f32[256,1024]{1,0:T(8,128)}) parameter(0)
  %x = f32[256,1024]{1,0:T(8,128)S(1)} get-tuple-element(%p.1), index=1
  %g = (f32[256,1024]{1,0:T(8,128)S(1)}, f32[256,1024]{1,0:T(8,128)}, u32[]{:S(2)}, /*index=3*/u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,4},{4,0},{1,1},{2,2}}, metadata={op_name="a(b)"}
  %d = f32[256,1024]{1,0:T(8,128)} collective-permute-done(%g), metadata={op_name="jit(f)/while"}
  ROOT %t = (s32[]{:T(128)}, f32[256,1024]{1,0:T(8,128)}) tuple(%i.1, %d)
}

ENTRY %main (a: f32[256,1024], b: bf16[8,128]) -> f32[256,1024] {
  %a = f32[256,1024]{1,0:T(8,128)} parameter(0)
  %b = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %w = (s32[]{:T(128)}, f32[256,1024]{1,0:T(8,128)}) while(%a), condition=%cond, body=%body
  %s = ((bf16[8,128]{1,0}), bf16[2,128]{1,0}, u32[]) async-start(%b), calls=%inside
  %e = bf16[2,128]{1,0} async-done(%s)
  %c = ((bf16[8,128]{1,0}, token[]), bf16[2,128]{1,0}) call-start(%b), async_execution_thread="sparsecore", \
to_apply=%inside, metadata={op_name="jit(f)/reduce_scatter"}
  %o = pred[8]{0} all-gather-start(%b), channel_id=4, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(2)2}
  %n = s32[8]{0} ragged-all-to-all(%b, %a, %a, %a), replica_groups={{0,2},{1,3},{4,6},{5,7}}
  ROOT %z = bf16[8,128]{1,0} all-reduce-start(%b), replica_groups={}, use_global_device_ids=true
}
"""


def test_asynchronous_forms_and_layouts_as_tpus_have_them() -> None:
    b = 8 * 128 * 2
    assert collectives(TPU, SHAPE) == [
        Collective("collective-permute", ("a",), 2, 256 * 1024 * 4, 7),
        Collective("reduce-scatter", ("b", "c"), 4, 3 / 4 * b, 1),
        Collective("reduce-scatter", ("b", "c"), 4, 3 / 4 * b, 1),  # on the SparseCores
        Collective("all-gather", ("c",), 2, b, 1),
        Collective("ragged-all-to-all", ("b",), 2, b / 2, 1),
        Collective("all-reduce", ("a", "b", "c"), 8, 2 * 7 / 8 * b, 1),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%r", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8], use_global_device_ids=true", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={1}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['x'=2,'y'=1,'z'=4] {'x'}, to_apply=%r", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh[x=8] {x:(1)2,x:(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh[x=4,y=2], device_ids=([2,4]T(1,0)) {y}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh[x=2,y=2], device_ids=(3,1,2,0) {x}, channel_id=1", [[3, 2], [1, 0]]),
        ("channel_id=1, source_target_pairs={{0,1},{1,0},{2,2}}, metadata={}", [[0, 1], [1, 0]]),
    ],
)
def test_forms_of_groups(text: str, expected: list[list[int]]) -> None:
    assert replica_groups(text, 8) == expected


def test_groups_of_an_unknown_form_are_refused() -> None:
    with pytest.raises(LmxError, match="unknown form: replica_groups=everyone"):
        replica_groups("replica_groups=everyone", math.prod(SHAPE.values()))
