"""Sublayers side by side on one input (Wang and Komatsuzaki 2021; Chowdhery et al. 2022, section 2)."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
from flax import nnx

from lmx.nn.cache import LayerCache
from lmx.nn.context import Context, SublayerOutput
from lmx.nn.module import Declarations, Params, Part
from lmx.nn.sublayer import Sublayer


@dataclass(frozen=True)
class Parallel(Sublayer):
    """The sum of the branches' outputs on the same input; the norms stand here, once, not on the branches."""

    branches: tuple[Sublayer, ...] = ()

    @property
    def name(self) -> str:
        """The sublayer's key in the parameters."""
        return "parallel"

    def inner(self, width: int) -> Part:
        """The module for inputs [batch, length, width]."""
        return Part(functools.partial(ParallelModule, self, width))

    def cache_streams(self, batch: int, slots: int, memory: int = 0) -> dict[str, tuple[int, ...]]:
        """The branches' streams, called branch/stream."""
        return {
            f"{branch.name}/{stream}": shape
            for branch in self.branches
            for stream, shape in branch.cache_streams(batch, slots, memory).items()
        }

    @property
    def parts(self) -> dict[str, Sublayer]:
        """The branches."""
        return {branch.name: branch for branch in self.branches}

    def used(self, name: str) -> float:
        """What the branch says."""
        branch, _, rest = name.partition("/")
        return self.parts[branch].used(rest)

    def stepped(self, params: Params, told: Mapping[str, jax.Array]) -> Params:
        """Each branch's rule on its own parameters."""
        own = {
            b.name: {k.split("/", 1)[1]: a for k, a in told.items() if k.startswith(f"{b.name}/")}
            for b in self.branches
        }
        return {**params, **{b.name: b.stepped(params[b.name], own[b.name]) for b in self.branches if own[b.name]}}


class ParallelModule(nnx.Module):
    """[batch, length, embed] -> [batch, length, embed]."""

    def __init__(self, spec: Parallel, width: int, declared: Declarations):
        self.names = tuple(branch.name for branch in spec.branches)
        for branch in spec.branches:
            setattr(self, branch.name, branch.inner(width).build(declared))

    def __call__(self, x: jax.Array, context: Context) -> SublayerOutput:
        outs = {n: getattr(self, n)(x, self._of(context.fold(i), n)) for i, n in enumerate(self.names)}
        streams = {f"{n}/{k}": a for n, o in outs.items() if o.cache for k, a in o.cache.streams.items()}
        cache = context.cache and LayerCache(streams, context.cache.view)
        aux = {f"{n}/{k}": a for n, o in outs.items() for k, a in o.aux.items()}
        return SublayerOutput(sum(o.hidden for o in outs.values()), cache, aux)

    def _of(self, context: Context, name: str) -> Context:
        """The context of one branch: with its streams only."""
        if context.cache is None:
            return context
        own = {k.split("/", 1)[1]: a for k, a in context.cache.streams.items() if k.startswith(f"{name}/")}
        return replace(context, cache=LayerCache(own, context.cache.view) if own else None)
