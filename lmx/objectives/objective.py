"""What every objective is: a small configuration that knows its loss."""

import abc
from dataclasses import dataclass, replace

import jax

from lmx.kernels.cross_entropy import LossSums
from lmx.models.model import aux_sum
from lmx.models.specs import ModelSpec, Remat
from lmx.nn.module import Params

Batch = dict[str, jax.Array]
"""int32 [batch, length] each: tokens, targets, segment_ids (0 is padding), positions."""


@dataclass(frozen=True)
class Objective(abc.ABC):
    """Base class of the objectives."""

    @abc.abstractmethod
    def loss(
        self, spec: ModelSpec, params: Params, batch: Batch, *, key: jax.Array | None = None, remat: Remat = "none"
    ) -> LossSums:
        """The sums of the losses over the batch's targets, and of their weights.

        Sums rather than means: microbatches and devices may hold different numbers of targets, and only the sums
        over all of them give every target the same weight.
        """


def with_aux(sums: LossSums, aux: Params) -> LossSums:
    """The sums with the sublayers' own losses (routers') in what is minimised, each target carrying them once."""
    if not aux:
        return sums
    told = jax.tree.map(lambda a: jax.lax.stop_gradient(a) * sums.weight, aux)
    return replace(sums, total=sums.total + aux_sum(aux, "loss") * sums.weight, aux=told)
