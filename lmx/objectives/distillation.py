"""Distillation (Hinton et al. 2015): a model learns its own objective, and to predict as a trained one does."""

import abc
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

import jax
import jax.numpy as jnp

from lmx.config import NOT_NEGATIVE, POSITIVE, SHARE
from lmx.data.layout import Layout
from lmx.errors import UserError
from lmx.kernels.cross_entropy import LossSums, Readout
from lmx.kernels.distillation import Softening, distillation_loss
from lmx.models.config import ModelConfig
from lmx.models.model import readout
from lmx.models.schedules import schedule, stages
from lmx.models.specs import ModelSpec, Remat
from lmx.nn.module import Params
from lmx.objectives.next_token import NextToken
from lmx.objectives.objective import Batch, Frozen, Objective, TokenPrediction, target_segments
from lmx.objectives.vocabulary import Vocabulary

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class Taught(Objective):
    """Base class of the objectives that are learnt from a teacher's predictions too."""

    teacher: str = ""
    """The directory of the teacher: a run, a Hugging Face directory or a converted model, of the same tokens (and
    classes)."""
    share: Annotated[float, SHARE] = 0.5
    """Share of the loss that is the divergence from the teacher; the rest is the objective's own."""
    temperature: Annotated[float, POSITIVE] = 2.0
    """Divides the logits or scores of both models; the divergence is multiplied by its square."""

    @property
    def models(self) -> Mapping[str, str]:
        """The teacher."""
        return {TEACHER: self.teacher}

    def loss_with(self, models: Mapping[str, Frozen]) -> Callable[..., LossSums]:
        """The loss with the teacher's part."""
        return functools.partial(self.taught, models[TEACHER])

    @abc.abstractmethod
    def taught(
        self,
        teacher: Frozen,
        spec: ModelSpec,
        params: Params,
        batch: Batch,
        *,
        key: jax.Array | None = None,
        remat: Remat = "none",
    ) -> LossSums:
        """As :meth:`Objective.loss`, with the divergence from the teacher."""


@dataclass(frozen=True)
class Distillation(Taught):
    """Another objective, learnt from a teacher's predictions too. Evaluated as that objective is, without a teacher."""

    objective: TokenPrediction = field(default_factory=NextToken)
    """What is predicted: NextToken(), MaskedLm(), SeqToSeq(), ..."""
    top: Annotated[int, NOT_NEGATIVE] = 0
    """Only so many of the teacher's likeliest tokens count; 0 for all of them."""
    states: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of how far the states that logits are made of point away from the teacher's: 1 - cosine where they are as
    wide (Sanh et al. 2019), else by the likenesses among a document's states (Tung and Mori 2019)."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The objective's."""
        return self.objective.special_tokens

    @property
    def evaluated(self) -> Objective:
        """The objective, without the teacher."""
        return self.objective.evaluated

    @property
    def reads_prefix(self) -> bool:
        """The objective's."""
        return self.objective.reads_prefix

    @property
    def ends_source(self) -> bool:
        """The objective's."""
        return self.objective.ends_source

    def check(self, model: ModelConfig, length: int) -> None:
        """What fits the objective fits."""
        if self.top > model.vocab:
            raise UserError(f"objective.top is {self.top}, expected 0 (all) to model.vocab {model.vocab} tokens")
        self.objective.check(model, length)

    def layout(self, vocabulary: Vocabulary, spec: ModelSpec, length: int) -> Layout:
        """The objective's."""
        return self.objective.layout(vocabulary, spec, length)

    def scored(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The objective's."""
        return self.objective.scored(batch)

    def weighed(self, batch: Batch) -> Batch:
        """The objective's."""
        return self.objective.weighed(batch)

    def loss(
        self, spec: ModelSpec, params: Params, batch: Batch, *, key: jax.Array | None = None, remat: Remat = "none"
    ) -> LossSums:
        """The objective's own."""
        return self.objective.loss(spec, params, batch, key=key, remat=remat)

    def taught(
        self,
        teacher: Frozen,
        spec: ModelSpec,
        params: Params,
        batch: Batch,
        *,
        key: jax.Array | None = None,
        remat: Remat = "none",
    ) -> LossSums:
        """See :class:`Taught`."""
        if schedule() == "1f1b" and stages() > 1:
            raise UserError("pipeline.schedule 1f1b has no place for a teacher; use gpipe or circular to distil")
        hidden = jax.lax.stop_gradient(self.objective.states(teacher.spec, teacher.params, batch))
        theirs = readout(teacher.spec, teacher.params, hidden)
        losses = functools.partial(self._losses, theirs, target_segments(batch))
        return self.objective.token_loss(losses, spec, params, batch, key=key, remat=remat)

    def _losses(
        self, theirs: Readout, segments: jax.Array, ours: Readout, targets: jax.Array, weights: jax.Array
    ) -> LossSums:
        inner = self.objective
        how = Softening(self.share, self.temperature, self.top, inner.z_loss, inner.label_smoothing)
        sums = distillation_loss(ours, theirs, targets, weights, how)
        if not self.states:
            return sums
        apart = states_apart(ours.hidden, theirs.hidden, segments)
        told = {"metrics": {**sums.aux["metrics"], "states_apart": jax.lax.stop_gradient(apart)}}
        return replace(sums, total=sums.total + self.states * apart, aux=told)


def states_apart(ours: jax.Array, theirs: jax.Array, segments: jax.Array) -> jax.Array:
    """How far a student's hidden states point away from a teacher's, summed over the targets.

    Of states that are as wide, ``1 - cosine`` of each pair (Sanh et al. 2019, 3). Else, at each target, the mean square
    of the differences between its cosines with the targets of its segment in the one model and in the other (Tung and
    Mori 2019, 3.1, with states for the samples of a batch): 0 where both see the same likenesses.

    Args:
      ours, theirs: [batch, targets, embed], of any two widths.
      segments: int32 [batch, targets], 0 where there is no target.
    """
    ours, theirs = (_unit(a.astype(jnp.float32)) for a in (ours, theirs))
    real = (segments > 0).astype(jnp.float32)
    if ours.shape[-1] == theirs.shape[-1]:
        return (real * (1 - (ours * theirs).sum(-1))).sum()
    like, wanted = (jnp.einsum("bld,bmd->blm", a, a) for a in (ours, theirs))
    together = real[:, None] * (segments[:, :, None] == segments[:, None])
    count = jnp.maximum(together.sum(-1), 1)
    return ((together * jnp.square(like - wanted)).sum(-1) / count).sum()


def _unit(a: jax.Array) -> jax.Array:
    return a / jnp.sqrt(jnp.square(a).sum(-1, keepdims=True) + 1e-12)
