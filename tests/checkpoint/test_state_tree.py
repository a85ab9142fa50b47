from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from lmx.checkpoint import tree
from lmx.errors import UserError


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def test_names_do_not_depend_on_the_container():
    a, b = jnp.zeros(1), jnp.ones(2)
    named = {("opt", "0", "count"), ("opt", "0", "mu", "w"), ("opt", "1")}
    assert set(tree.named_leaves({"opt": (Moments(a, {"w": b}), a, None)})) == named
    assert set(tree.named_leaves({"opt": {0: {"count": a, "mu": {"w": b}}, 1: a}})) == named


def test_nest_undoes_naming():
    state = {"a": {"b": jnp.zeros(1), "c": jnp.ones(2)}, "d": jnp.ones(3)}
    assert jax.tree.structure(tree.nest(tree.named_leaves(state))) == jax.tree.structure(state)
    assert tree.nest(tree.named_leaves(state["d"])) is state["d"]


def test_refuses_what_would_not_come_back_the_same():
    with pytest.raises(TypeError, match="lr is a float"):
        tree.storable({"lr": 1.0})
    with pytest.raises(TypeError, match="key is a typed key"):
        tree.storable({"key": jax.random.key(0)})


def test_says_which_leaves_differ():
    stored = tree.named_leaves({"w": jnp.zeros((3, 4)), "b": jnp.zeros(4), "old": jnp.zeros(1)})
    wanted = tree.named_leaves({"w": jnp.zeros((3, 5)), "b": jnp.zeros(4, jnp.bfloat16), "new": jnp.zeros(1)})
    with pytest.raises(UserError) as error:
        tree.check_fits(stored, wanted, "the checkpoint")
    for part in ("w is float32[3,4], expected float32[3,5]", "b is float32[4], expected bfloat16[4]"):
        assert part in str(error.value)
    assert "new is missing" in str(error.value)
    assert "old is unexpected" in str(error.value)
