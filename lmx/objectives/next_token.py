"""Next-token prediction (Radford et al. 2019)."""

from dataclasses import dataclass

from lmx.data.layout import Layout, NextTokens
from lmx.errors import UserError
from lmx.models.config import ModelConfig
from lmx.models.model import Inputs
from lmx.models.specs import ModelSpec
from lmx.objectives.objective import Batch, Reading, TokenPrediction, check_decoder
from lmx.objectives.vocabulary import Vocabulary


@dataclass(frozen=True)
class NextToken(TokenPrediction):
    """Cross-entropy of each token given those before it in its own document."""

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

    def reading(self, spec: ModelSpec, batch: Batch) -> Reading:
        """Every position."""
        return Reading(Inputs(batch["tokens"], batch["positions"], batch["segment_ids"]))
