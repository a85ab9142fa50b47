"""Feed-forward layers, plain and gated."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
from flax import nnx

from lmx.nn.context import Context, SublayerOutput
from lmx.nn.linear import Linear
from lmx.nn.module import Part, dropout
from lmx.nn.sublayer import Sublayer
from lmx.sharding.rules import constrain

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
HIDDEN = ("act_batch", "act_length", "act_mlp")


@dataclass(frozen=True)
class Mlp(Sublayer):
    """``down(activation(up(x)))``, or gated, ``down(activation(gate(x)) * up(x))`` (Shazeer 2020: SwiGLU with silu)."""

    hidden: int = 3072
    activation: Activation = "gelu_tanh"
    gated: bool = False
    bias: bool = False

    @property
    def name(self) -> str:
        """The sublayer's key in the parameters."""
        return "mlp"

    def inner(self, width: int) -> Part:
        """The module for inputs [batch, length, width]."""
        return Part(functools.partial(MlpModule, self, width))


class MlpModule(nnx.Module):
    """[batch, length, embed] -> [batch, length, embed]."""

    def __init__(self, spec: Mlp, width: int, rngs: nnx.Rngs):
        self.spec = spec
        linear = functools.partial(Linear, bias=spec.bias, rngs=rngs)
        self.up = linear((width,), (spec.hidden,), ("embed", "mlp"), std=spec.std)
        self.gate = linear((width,), (spec.hidden,), ("embed", "mlp"), std=spec.std) if spec.gated else None
        self.down = linear((spec.hidden,), (width,), ("mlp", "embed"), std=spec.out_std)

    def __call__(self, x: jax.Array, context: Context) -> SublayerOutput:
        activation = ACTIVATIONS[self.spec.activation]
        up = constrain(self.up(x), HIDDEN)
        hidden = activation(up) if self.gate is None else activation(constrain(self.gate(x), HIDDEN)) * up
        return SublayerOutput(dropout(self.down(hidden), self.spec.dropout, context.fold(0).key))
