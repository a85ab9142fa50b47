from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lmx.errors import UserError
from lmx.models.model import param_axes, param_shapes
from lmx.sharding.layouts import LAYOUTS
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding, constrain, manual_axes, split_axes, use_sharding, ways


def sharding(data: int = 2, fsdp: int = 2, tensor: int = 2, rules: Rules | None = None) -> Sharding:
    return Sharding(build_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor)), rules or Rules())


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("embed", "mlp"), P("fsdp", "tensor")),
        (("layers", "embed", "heads", "head_dim"), P("stage", "fsdp", "tensor", None)),
        (("act_batch", "act_length", None), P(Rules().act_batch, "sequence", None)),
    ],
)
def test_rules_lay_logical_axes_on_the_mesh(axes, expected):
    assert Rules().spec(axes) == expected


def test_a_rule_is_data():
    assert Rules(mlp=(), act_batch=("data",)).spec(("embed", "mlp", "act_batch")) == P("fsdp", None, "data")


def test_ways_counts_pieces():
    assert sharding().ways("act_batch") == 4
    assert sharding().ways("act_length") == 1
    assert ways("act_batch") == 1
    with use_sharding(sharding()):
        assert ways("vocab") == 2


def test_constrain_lays_out_within_use_sharding_only():
    x = jnp.zeros((8, 4))
    axes = ("act_batch", "act_mlp")
    assert constrain(x, axes) is x

    @jax.jit
    def laid_out(x):
        with use_sharding(sharding()):
            return constrain(x, axes)

    assert laid_out(x).sharding.is_equivalent_to(sharding().named(axes), x.ndim)
    assert laid_out(x).addressable_shards[0].data.shape == (2, 2)


def test_every_parameter_has_an_axis_for_each_dimension(golden):
    axes, shapes = param_axes(golden.spec), param_shapes(golden.spec)
    is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    assert jax.tree.structure(axes, is_leaf=is_leaf) == jax.tree.structure(shapes)
    for names, shape in zip(jax.tree.leaves(axes, is_leaf=is_leaf), jax.tree.leaves(shapes), strict=True):
        assert len(names) == len(shape.shape)
    sharding().check_divides(axes, shapes)
    assert jax.tree.structure(sharding().tree(axes)) == jax.tree.structure(shapes)


def test_a_mesh_that_does_not_divide_a_parameter_says_which(llama):
    axes, shapes = param_axes(llama.spec), param_shapes(llama.spec)
    with pytest.raises(UserError) as error:
        sharding(1, 2, 4).check_divides(axes, shapes)
    assert str(error.value) == (
        "the mesh splits the axis 'kv_heads' of stack/segment_0/block_0/attention/key/kernel into 4 (mesh axes "
        "tensor), which does not divide its size 2; choose a mesh that splits it into 2, the nearest number that "
        "divides it, or set --rules.kv-heads to no axes"
    )
    sharding(1, 2, 4, replace(Rules(), kv_heads=())).check_divides(axes, shapes)


def test_a_rule_for_an_unknown_mesh_axis_is_refused():
    sharding = Sharding(build_mesh(MeshConfig(), jax.devices()[:1]), Rules(embed=("tensr",)))
    with pytest.raises(UserError, match=r"rules\.embed names the mesh axis 'tensr', expected some of slice, data"):
        sharding.check_divides({"w": ("embed",)}, {"w": jax.ShapeDtypeStruct((8,), "float32")})


def test_a_length_that_the_mesh_does_not_divide_says_which_and_the_nearest():
    mesh = build_mesh(MeshConfig(data=1, sequence=4, tensor=2))
    Sharding(mesh, Rules()).check_length(12)
    with pytest.raises(UserError) as error:
        Sharding(mesh, LAYOUTS["megatron"].rules).check_length(12)
    assert str(error.value) == (
        "the mesh splits 'act_residual' into 8 (mesh axes sequence, tensor), which does not divide the length 12; the "
        "nearest length that it divides is 16"
    )


def test_inside_a_manual_region_its_axes_do_not_count():
    mesh = sharding(2, 1, 4)
    x, axes = jnp.zeros((8, 16)), ("act_batch", "act_mlp")
    seen = []

    def local(x):
        seen.append((ways("act_batch"), ways("act_mlp"), split_axes("act_batch"), manual_axes()))
        return constrain(x, axes) + 1

    with use_sharding(mesh):
        out = jax.jit(
            jax.shard_map(local, mesh=mesh.mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
        )(x)
    assert seen[-1] == (1, 4, ("data",), {"data"})
    assert out.sharding.is_equivalent_to(mesh.named(axes), 2)
