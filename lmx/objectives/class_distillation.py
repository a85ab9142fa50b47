"""Distillation of a classifier (Hinton et al. 2015): its classes, and to tell them as a trained one does."""

from dataclasses import dataclass, replace

import jax

from lmx.kernels.cross_entropy import LossSums
from lmx.kernels.distillation import divergence
from lmx.models.specs import ModelSpec, Remat
from lmx.nn.module import Params
from lmx.objectives.classification import Classification
from lmx.objectives.distillation import Taught
from lmx.objectives.objective import Batch, Frozen, Objective

SCORES = "teacher_scores"


@dataclass(frozen=True)
class ClassDistillation(Taught, Classification):
    """A text's one class, learnt from a teacher's probabilities too. Evaluated without a teacher."""

    @property
    def evaluated(self) -> Objective:
        """The classes alone."""
        return Classification(self.longer, self.label_smoothing)

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
        theirs = jax.lax.stop_gradient(self.scores(teacher.spec, teacher.params, batch))
        scored = Scored(self.longer, self.label_smoothing, self.share, self.temperature)
        return scored.loss(spec, params, {**batch, SCORES: theirs}, key=key, remat=remat)


@dataclass(frozen=True)
class Scored(Classification):
    """The sums of a batch that has the teacher's ``teacher_scores``, float32 [batch, places, classes]."""

    share: float = 0.5
    temperature: float = 2.0

    def score(self, scores: jax.Array, batch: Batch) -> tuple[LossSums, dict[str, jax.Array]]:
        """``(1 - share) * CE + share * T^2 * KL(softmax(t / T) || softmax(s / T))``; ``teacher_kl`` is the sum of that
        divergence, in nats at the temperature."""
        sums, measures = super().score(scores, batch)
        apart = divergence(scores / self.temperature, batch[SCORES] / self.temperature)
        apart = (apart * self.scored(batch)[1]).sum()
        total = (1 - self.share) * sums.total + self.share * self.temperature**2 * apart
        told = {"metrics": {"teacher_kl": jax.lax.stop_gradient(apart)}}
        return replace(sums, total=total, aux=told), measures
