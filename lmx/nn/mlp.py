"""Feed-forward layers, plain and gated."""

import functools
from dataclasses import dataclass

import jax
from flax import nnx

from lmx.nn.activation import ACTIVATIONS, Activation, Gating
from lmx.nn.context import Context, SublayerOutput
from lmx.nn.linear import Linear
from lmx.nn.module import Declarations, Part, dropout
from lmx.nn.sublayer import Sublayer
from lmx.sharding.rules import constrain

HIDDEN = ("act_batch", "act_length", "act_mlp")


@dataclass(frozen=True)
class Mlp(Sublayer):
    """``down(activation(up(x)))``, or with a gating, ``down(gating(gate(x), up(x)))`` (``Glu("silu")``: SwiGLU)."""

    hidden: int = 3072
    activation: Activation | Gating = "gelu_tanh"
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

    def __init__(self, spec: Mlp, width: int, declared: Declarations):
        self.spec = spec
        linear = functools.partial(Linear, bias=spec.bias, declared=declared)
        gated = isinstance(spec.activation, Gating)
        self.up = linear((width,), (spec.hidden,), ("embed", "mlp"), std=spec.std)
        self.gate = linear((width,), (spec.hidden,), ("embed", "mlp"), std=spec.std) if gated else None
        self.down = linear((spec.hidden,), (width,), ("mlp", "embed"), std=spec.out_std)

    def __call__(self, x: jax.Array, context: Context) -> SublayerOutput:
        hidden = self.down(self._hidden(x))
        return SublayerOutput(dropout(hidden, self.spec.dropout, context.fold(0).key))

    def _hidden(self, x: jax.Array) -> jax.Array:
        activation, up = self.spec.activation, constrain(self.up(x), HIDDEN)
        if isinstance(activation, Gating):
            assert self.gate is not None
            return activation(constrain(self.gate(x), HIDDEN), up)
        return ACTIVATIONS[activation](up)
