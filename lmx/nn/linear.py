"""Linear maps between named axes."""

import math

import jax
from flax import nnx

from lmx.nn.module import parameter
from lmx.sharding.rules import LogicalAxes


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
        rngs: nnx.Rngs,
    ):
        self.inputs, self.outputs = inputs, outputs
        self.kernel = parameter(rngs, inputs + outputs, axes, nnx.initializers.normal(std))
        bias_axes = tuple("norm" if a == "embed" else a for a in axes[len(inputs) :])
        self.bias = parameter(rngs, outputs, bias_axes, nnx.initializers.zeros) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        lead = x.shape[: x.ndim - len(self.inputs)]
        rows, columns = math.prod(self.inputs), math.prod(self.outputs)
        kernel = self.kernel[...].astype(x.dtype)
        if len(self.inputs) == 1 and len(self.outputs) == 1:
            y = x @ kernel
        else:
            y = (x.reshape(*lead, rows) @ kernel.reshape(rows, columns)).reshape(*lead, *self.outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
