"""Linear maps between named axes."""

import math
from typing import Any

import jax
from flax import nnx

from lmx.nn.kernel import is_kernel
from lmx.nn.module import Declarations, parameter
from lmx.sharding.rules import LogicalAxes, split_axes


class Linear(nnx.Module):
    """[..., *inputs] -> [..., *outputs]; the kernel is [*inputs, *outputs], the optional bias [*outputs].

    Inputs and outputs may each be several axes (heads and head_dim), so that they can be sharded by name.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: LogicalAxes,
        *,
        std: float,
        bias: bool = False,
        declared: Declarations,
    ):
        self.inputs, self.outputs = inputs, outputs
        self.kernel = parameter(declared, inputs + outputs, axes, nnx.initializers.normal(std))
        bias_axes = tuple("norm" if a == "embed" else a for a in axes[len(inputs) :])
        self.bias = parameter(declared, outputs, bias_axes, nnx.initializers.zeros) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        lead = x.shape[: x.ndim - len(self.inputs)]
        rows, columns = math.prod(self.inputs), math.prod(self.outputs)
        kernel = self.kernel[...].astype(x.dtype)
        y = matmul(x.reshape(*lead, rows), kernel.reshape(rows, columns)).reshape(*lead, *self.outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def matmul(x: jax.Array, kernel: Any) -> jax.Array:
    """[..., rows] @ [rows, columns] -> [..., columns]; the kernel is an array, or what multiplies as one does."""
    return x @ kernel if is_kernel(kernel) else _product(x, kernel)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """With its own backward pass, because JAX's forms a kernel's gradient as the transpose of [columns, rows], for
    which XLA on CPU writes what comes from the next layer a second time, transposed: up to a tenth of a step."""
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The kernel's gradient is a product of matrices, as which XLA on CPU is faster: of more axes it copies what goes
    in. Where the mesh splits the length it stays one of arrays, because to merge that axis would gather it."""
    x, kernel = saved
    d_x = jax.lax.dot_general(d_y, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    if not (split_axes("act_length") or split_axes("act_residual")):
        x, d_y = (a.reshape(-1, a.shape[-1]) for a in (x, d_y))
    lead = tuple(range(x.ndim - 1))
    return d_x, jax.lax.dot_general(x, d_y, ((lead, lead), ((), ())))


_product.defvjp(_forward, _backward)
