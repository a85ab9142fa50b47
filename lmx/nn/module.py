"""How Flax NNX modules are used: declared once, then applied as pure functions of plain parameter dicts.

A module declares each parameter with its shape, logical axes and initializer, and never changes itself when called.
``Part`` turns such a declaration into three pure things: ``init`` (key -> parameters), ``axes`` (the parallel tree of
logical axes) and ``bind`` (parameters -> a module to call).
"""

import functools
import itertools
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


class Declarations:
    """Numbers the parameters of a module in the order in which they are declared."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def number(self) -> int:
        """The next parameter's."""
        return next(self._numbers)


def parameter(declared: Declarations, shape: tuple[int, ...], axes: LogicalAxes, init: Initializer) -> nnx.Param:
    """Declares a float32 parameter with one logical axis name for each dimension; ``init`` makes it later."""
    shaped = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nnx.Param(shaped, axes=axes, init=init, number=declared.number())


@dataclass(frozen=True)
class Part:
    """A module by its constructor: ``build(declared)`` makes it. Equal builders share one structure."""

    build: Callable[[Declarations], nnx.Module]

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters, each drawn by its number."""

        count = len(jax.tree.leaves(self.shapes()))
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))  # at once: compiled in less

        def fresh(declared: nnx.Variable) -> jax.Array:
            told = declared.get_metadata()
            return cast(jax.Array, told["init"](keys[told["number"]], declared.shape, jnp.float32))

        return self._each(fresh)

    def shapes(self) -> Params:
        """What :meth:`init` makes, as ``jax.ShapeDtypeStruct``."""
        return self._each(lambda declared: declared.get_value())

    def axes(self) -> Params:
        """The logical axes of every parameter, a tree parallel to :meth:`init`'s."""
        return self._each(lambda declared: declared.get_metadata()["axes"])

    def bind(self, params: Params) -> Any:
        """The module, holding these parameters."""
        return nnx.merge(_structure(self)[0], params)

    def _each(self, of: Callable[[nnx.Variable], Any]) -> Params:
        is_leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        return cast(Params, nnx.to_pure_dict(jax.tree.map(of, _structure(self)[1], is_leaf=is_leaf)))


def _structure(part: Part) -> tuple[Any, Any]:
    build = part.build
    if not isinstance(build, functools.partial):
        return _built(build, (), ())
    return _built(
        build.func, build.args, tuple(sorted(build.keywords.items()))
    )  # partials are equal to themselves only


@functools.lru_cache(maxsize=1024)
def _built(build: Callable[..., nnx.Module], args: tuple[Any, ...], keywords: tuple[Any, ...]) -> tuple[Any, Any]:
    return nnx.split(build(*args, Declarations(), **dict(keywords)))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share ``rate`` of the entries and scales up the rest (Srivastava et al. 2014); no key, no change."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
