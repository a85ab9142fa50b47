"""Next-token prediction (Radford et al. 2019)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lmx.kernels.cross_entropy import LossSums, vocabulary_loss
from lmx.models.model import Inputs, apply, readout
from lmx.models.specs import ModelSpec, Remat
from lmx.nn.module import Params
from lmx.objectives.objective import Batch, Objective, with_aux


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of each token given those before it in its own document."""

    z_loss: float = 0.0
    """Weight of the squared log-normaliser, which keeps logits near zero (Chowdhery et al. 2022: 1e-4)."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread over the vocabulary."""

    def loss(
        self, spec: ModelSpec, params: Params, batch: Batch, *, key: jax.Array | None = None, remat: Remat = "none"
    ) -> LossSums:
        """The sums over every position that is not padding."""
        inputs = Inputs(batch["tokens"], batch["positions"], batch["segment_ids"])
        out = apply(spec, params, inputs, key=key, remat=remat)
        weights = (batch["segment_ids"] > 0).astype(jnp.float32)
        sums = vocabulary_loss(
            readout(spec, params, out.hidden),
            batch["targets"],
            weights,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
        )
        return with_aux(sums, out.aux)
