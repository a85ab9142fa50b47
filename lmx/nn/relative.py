"""A bias on attention's scores by relative position, one table for a whole stack (Raffel et al. 2020, 2.1)."""

import abc
import functools
from dataclasses import dataclass

from flax import nnx

from lmx.kernels.relative import RelativeBuckets
from lmx.nn.module import Declarations, Part, parameter


@dataclass(frozen=True)
class Shared(abc.ABC):
    """Base class of what belongs to a whole stack: parameters that its sublayers find in ``context.shared``."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Its key in the stack's ``shared`` parameters, and in the context."""

    @abc.abstractmethod
    def part(self) -> Part:
        """The module that holds the parameters."""


@dataclass(frozen=True)
class RelativeBias(Shared):
    """A learned scalar for each bucket of distances and each head."""

    heads: int
    buckets: RelativeBuckets
    std: float = 0.02

    @property
    def name(self) -> str:
        """Its key in the stack's ``shared`` parameters."""
        return "relative"

    def part(self) -> Part:
        """The module that holds ``table`` [buckets, heads]."""
        return Part(functools.partial(RelativeBiasModule, self))


class RelativeBiasModule(nnx.Module):
    """Holds ``table`` [buckets, heads]."""

    def __init__(self, spec: RelativeBias, declared: Declarations):
        shape = (spec.buckets.buckets, spec.heads)
        self.table = parameter(declared, shape, (None, "heads"), nnx.initializers.normal(spec.std))
