"""How Flax NNX modules are used: declared once, then applied as pure functions of plain parameter dicts.

A module declares each parameter with its shape, logical axes and initializer, and never changes itself when called.
``Part`` turns such a declaration into three pure things: ``init`` (key -> parameters), ``axes`` (the parallel tree of
logical axes) and ``bind`` (parameters -> a module to call).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from lmx.sharding.rules import LogicalAxes

Params = dict[str, Any]
"""Nested dicts of arrays with readable names."""
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: LogicalAxes, init: Initializer) -> nnx.Param:
    """Declares a float32 parameter with one logical axis name for each dimension."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


@dataclass(frozen=True)
class Part:
    """A module by its constructor: ``build(rngs)`` makes it. Equal builders share one traced structure."""

    build: Callable[[nnx.Rngs], nnx.Module]

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""
        return cast(Params, nnx.to_pure_dict(nnx.state(self.build(nnx.Rngs(params=key)))))

    def axes(self) -> Params:
        """The logical axes of every parameter, a tree parallel to :meth:`init`'s."""
        state = _structure(self)[1]
        is_leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        return cast(Params, nnx.to_pure_dict(jax.tree.map(lambda v: v.get_metadata()["axes"], state, is_leaf=is_leaf)))

    def bind(self, params: Params) -> Any:
        """The module, holding these parameters."""
        return nnx.merge(_structure(self)[0], params)


def _structure(part: Part) -> tuple[Any, Any]:
    build = part.build
    if not isinstance(build, functools.partial):
        return _traced(build, (), ())
    return _traced(
        build.func, build.args, tuple(sorted(build.keywords.items()))
    )  # partials are equal to themselves only


@functools.lru_cache(maxsize=1024)
def _traced(build: Callable[..., nnx.Module], args: tuple[Any, ...], keywords: tuple[Any, ...]) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: build(*args, nnx.Rngs(params=0), **dict(keywords))))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share ``rate`` of the entries and scales up the rest (Srivastava et al. 2014); no key, no change."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
