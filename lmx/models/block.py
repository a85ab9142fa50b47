"""A block: its sublayers and their norms as one module."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import jax
from flax import nnx

from lmx.models.specs import BlockSpec
from lmx.nn.cache import Streams
from lmx.nn.context import Context, SublayerOutput
from lmx.nn.module import Declarations, Part
from lmx.nn.noise import DEPTH
from lmx.nn.norm import build_norm
from lmx.nn.sublayer import Sublayer
from lmx.sharding.rules import constrain

RESIDUAL = ("act_batch", "act_residual", "act_embed")
INPUT = ("act_batch", "act_length", "act_embed")
"""Of a sublayer: where the residual stream's length is split further, it is gathered here, after the norm."""
NORMS = ("norm_in", "norm_out", "norm_residual")
Aux = dict[str, Mapping[str, jax.Array]]
"""By sublayer, what it tells beside its output."""


@dataclass(frozen=True)
class BlockOutput:
    """Hidden states [batch, length, embed], what the sublayers cached, and what else they tell."""

    hidden: jax.Array
    streams: Streams
    aux: Aux


class Block(nnx.Module):
    """[batch, length, embed] -> [batch, length, embed]."""

    def __init__(self, spec: BlockSpec, width: int, declared: Declarations):
        self.spec = spec
        for name, sublayer in zip(spec.names(), spec.sublayers, strict=True):
            setattr(self, name, sublayer.inner(width).build(declared))
            for place in NORMS:
                setattr(self, f"{name}_{place}", build_norm(getattr(sublayer, place), width, declared))

    def __call__(self, x: jax.Array, contexts: dict[str, Context]) -> BlockOutput:
        """Applies the sublayers, each with its context."""
        streams: Streams = {}
        aux: Aux = {}
        for name, sublayer in zip(self.spec.names(), self.spec.sublayers, strict=True):
            x = constrain(x, RESIDUAL)
            x, out = self._apply(name, sublayer, x, contexts[name])
            if out.cache is not None:
                streams[name] = out.cache.streams
            if out.aux:
                aux[name] = out.aux
        return BlockOutput(constrain(x, RESIDUAL), streams, aux)

    def _apply(self, name: str, sublayer: Sublayer, x: jax.Array, context: Context) -> tuple[jax.Array, SublayerOutput]:
        norms = {place: getattr(self, f"{name}_{place}") or _identity for place in NORMS}
        out = getattr(self, name)(constrain(norms["norm_in"](x), INPUT), context)
        added, depth = norms["norm_out"](out.hidden), self.spec.depth
        added = added if depth is None else depth(added, context.layer, context.fold(DEPTH).key)
        return norms["norm_residual"](x + added), out


def _identity(x: jax.Array) -> jax.Array:
    return x


def block_part(spec: BlockSpec, width: int) -> Part:
    """The block as a part: ``init``, ``axes`` and ``bind``."""
    return Part(functools.partial(Block, spec, width))
