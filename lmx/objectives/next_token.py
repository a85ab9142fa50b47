"""Next-token prediction (Radford et al. 2019)."""

import functools
from dataclasses import dataclass

import jax

from lmx.data.layout import Layout, NextTokens
from lmx.errors import UserError
from lmx.kernels.cross_entropy import LossSums, vocabulary_loss
from lmx.models.config import ModelConfig
from lmx.models.lockstep import score_layers
from lmx.models.model import Inputs, readout
from lmx.models.specs import ModelSpec, Remat
from lmx.nn.module import Params
from lmx.objectives.objective import Batch, Objective, check_decoder
from lmx.objectives.vocabulary import Vocabulary


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross-entropy of each token given those before it in its own document."""

    z_loss: float = 0.0
    """Weight of the squared log-normaliser, which keeps logits near zero (Chowdhery et al. 2022: 1e-4)."""
    label_smoothing: float = 0.0
    """Share of each target's probability that is spread over the vocabulary."""

    def check(self, model: ModelConfig, length: int) -> None:
        """A decoder without an encoder fits."""
        name = type(self).__name__
        if check_decoder(model, name).encoder is not None:
            raise UserError(
                f"objective {name} has no text for the encoder of a {model.family}: use SpanCorruption, Denoisers, "
                "PrefixLm or SeqToSeq"
            )

    def layout(self, vocabulary: Vocabulary, spec: ModelSpec, length: int) -> Layout:
        """Every token, in order."""
        return NextTokens(length)

    def loss(
        self, spec: ModelSpec, params: Params, batch: Batch, *, key: jax.Array | None = None, remat: Remat = "none"
    ) -> LossSums:
        """The sums over every position that is not padding."""
        inputs = Inputs(batch["tokens"], batch["positions"], batch["segment_ids"])
        score = functools.partial(self._score, spec)
        return score_layers(spec, params, inputs, batch, score, key=key, remat=remat)

    def _score(self, spec: ModelSpec, params: Params, hidden: jax.Array, batch: Batch) -> LossSums:
        return vocabulary_loss(
            readout(spec, params, hidden),
            *self.scored(batch),
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
        )
