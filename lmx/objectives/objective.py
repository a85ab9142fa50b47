"""What every objective is: a small configuration that knows its rows and its loss."""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lmx.data.layout import Layout
from lmx.errors import UserError
from lmx.kernels.cross_entropy import LossSums
from lmx.models.config import ModelConfig
from lmx.models.specs import ModelSpec, Remat
from lmx.nn.module import Params
from lmx.objectives.vocabulary import Vocabulary

Batch = dict[str, jax.Array]
"""int32 [batch, length] each: the arrays of the objective's layout; of next-token prediction tokens, targets,
segment_ids (0 is padding), positions."""


@dataclass(frozen=True)
class Objective(abc.ABC):
    """Base class of the objectives."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens that it needs beside the end of text, by the names that a trained tokenizer gives them."""
        return ()

    @abc.abstractmethod
    def check(self, model: ModelConfig, length: int) -> None:
        """Raises UserError, before anything is read, if such a model cannot learn it from rows of ``length``."""

    @abc.abstractmethod
    def layout(self, vocabulary: Vocabulary, spec: ModelSpec, length: int) -> Layout:
        """How documents become the rows of its batches.

        Raises:
          UserError: rows of ``length`` have no room for one example.
        """

    @abc.abstractmethod
    def loss(
        self, spec: ModelSpec, params: Params, batch: Batch, *, key: jax.Array | None = None, remat: Remat = "none"
    ) -> LossSums:
        """The sums of the losses over the batch's targets, and of their weights.

        Sums rather than means: microbatches and devices may hold different numbers of targets, and only the sums
        over all of them give every target the same weight.
        """

    def scored(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The tokens that are predicted, int32 [batch, targets], and float32 weights, 0 where there is nothing.

        The layout's ``targets``, in the segments ``target_segments`` where it has them, else ``segment_ids``.
        """
        segments = batch.get("target_segments", batch["segment_ids"])
        return batch["targets"], (segments > 0).astype(jnp.float32)


def check_decoder(model: ModelConfig, objective: str) -> ModelSpec:
    """The model's spec; raises UserError unless it predicts tokens from those before them."""
    spec = model.spec()
    if spec.head is None:
        raise UserError(
            f"objective {objective} predicts tokens, but model.task is {model.task!r}; set it to 'token_prediction'"
        )
    if spec.stack.looks_ahead:
        raise UserError(
            f"objective {objective} predicts each token from those before it, but a {model.family} sees the whole "
            "text: use MaskedLm, or a decoder or an encoder-decoder"
        )
    return spec
