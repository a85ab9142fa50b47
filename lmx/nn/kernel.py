"""Kernels that are not plain arrays, but stand where one stood in a parameter tree.

A kernel here is a pytree whose leaves start with ``layers`` as the array's own axes do, so that a scan over the layers,
a pipeline and a mesh take it as they take arrays. It is opened where a layer begins.
"""

import abc
from typing import Any, cast

import jax
import jax.numpy as jnp

from lmx.nn.module import Params


class Kernel(abc.ABC):
    """Base class: reads as the array :meth:`dense`."""

    @abc.abstractmethod
    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The kernel as an array of its own shape."""

    def opened(self, dtype: Any) -> Any:
        """What a layer multiplies by, in the dtype that it computes in: an array, or what multiplies as one does."""
        return self.dense(dtype)

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.dense()[index]


def is_kernel(value: Any) -> bool:
    """Whether this stands for an array."""
    return isinstance(value, Kernel)


def densed(value: Any, dtype: Any = jnp.float32) -> jax.Array:
    """A kernel or an array as an array of a dtype."""
    return value.dense(dtype) if isinstance(value, Kernel) else value.astype(dtype)


def plain(params: Params) -> Params:
    """The parameters with every kernel an array, float32."""
    return cast(Params, jax.tree.map(lambda a: a.dense() if is_kernel(a) else a, params, is_leaf=is_kernel))


def opened(params: Params, dtype: Any) -> Any:
    """The parameters of one layer, every kernel among them opened."""
    return jax.tree.map(lambda a: a.opened(dtype) if is_kernel(a) else a, params, is_leaf=is_kernel)
