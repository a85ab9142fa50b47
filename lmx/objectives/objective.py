"""What every objective is: a small configuration that knows its rows and its loss."""

import abc
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lmx.config import BELOW_ONE, NOT_NEGATIVE
from lmx.data.layout import Layout
from lmx.errors import UserError
from lmx.kernels.cross_entropy import LossSums, Readout, vocabulary_loss
from lmx.models.config import ModelConfig
from lmx.models.lockstep import Score, score_layers, with_told
from lmx.models.model import Inputs, apply, encode, readout
from lmx.models.specs import ModelSpec, Remat
from lmx.nn.module import Params
from lmx.objectives.vocabulary import Vocabulary

Batch = dict[str, jax.Array]
"""int32 [batch, length] each: the arrays of the objective's layout; of next-token prediction tokens, targets,
segment_ids (0 is padding), positions."""


TokenLoss = Callable[[Readout, jax.Array, jax.Array], LossSums]
"""(what predicts, int32 targets [batch, targets], float32 weights [batch, targets]) -> the sums of the losses."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["spec"])
@dataclass(frozen=True)
class Frozen:
    """A model that a loss reads and no step changes: a teacher, a reference."""

    spec: ModelSpec
    params: Params


Targets = Literal["tokens", "classes", "numbers", "pairs"]
"""What an objective learns: see :class:`Objective`."""


@dataclass(frozen=True)
class Objective(abc.ABC):
    """Base class of the objectives.

    ``targets`` says what is learned: tokens of text, classes (or places), of which one is right, numbers, or which of a
    pair is better.
    ``framed`` says that each text comes with what the tokenizer puts around prompts, as labelled examples do;
    ``problem`` is what Hugging Face calls the problem of a head for whole texts (``problem_type``).
    """

    targets: ClassVar[Targets] = "tokens"
    framed: ClassVar[bool] = False
    problem: ClassVar[str] = ""

    @property
    def models(self) -> Mapping[str, str]:
        """The directories of the models that the loss of training reads beside the one that is trained, by name; "" is
        the one that training starts from (``init_from``)."""
        return {}

    @property
    def evaluated(self) -> "Objective":
        """What a model is evaluated on, during training too: the objective itself."""
        return self

    def loss_with(self, models: Mapping[str, Frozen]) -> Callable[..., LossSums]:
        """The loss of training, given the models that :attr:`models` names: :meth:`loss` where there are none."""
        return self.loss

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens that it needs beside the end of text, by the names that a trained tokenizer gives them."""
        return ()

    @property
    def reads_prefix(self) -> bool:
        """Whether a decoder learns to go on with a prefix that sees all of itself."""
        return False

    @property
    def ends_source(self) -> bool:
        """Whether a decoder learns that an end token stands between what it reads and what it writes."""
        return False

    @abc.abstractmethod
    def check(self, model: ModelConfig, length: int) -> None:
        """Raises UserError, before anything is read, if such a model cannot learn it from rows of ``length``."""

    @abc.abstractmethod
    def layout(self, vocabulary: Vocabulary, spec: ModelSpec, length: int) -> Layout:
        """How documents become the rows of its batches.

        Raises:
          UserError: rows of ``length`` have no room for one example.
        """

    def weighed(self, batch: Batch) -> Batch:
        """A step's whole batch with the weights of what is asked beside its targets, float32, where anything is.

        A mean over anything but the targets needs its own count, and that of the whole batch: a microbatch does not
        have it, so the weights are found before the batch is cut. A batch that has them is given back.
        """
        return batch

    @abc.abstractmethod
    def loss(
        self, spec: ModelSpec, params: Params, batch: Batch, *, key: jax.Array | None = None, remat: Remat = "none"
    ) -> LossSums:
        """The sums of the losses over the batch's targets, and of their weights.

        Sums rather than means: microbatches and devices may hold different numbers of targets, and only the sums
        over all of them give every target the same weight.
        """

    def measured(
        self, models: Mapping[str, Frozen], spec: ModelSpec, params: Params, batch: Batch
    ) -> tuple[LossSums, dict[str, jax.Array]]:
        """The sums of evaluation, and others that it tells, float32: ``f1``, of the targets by weight; or ``hits``,
        ``guesses`` and ``cases`` [classes], of which an F1 for each class is made."""
        return self.loss_with(models)(spec, params, batch, remat="full"), {}

    def scored(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The tokens that are predicted, int32 [batch, targets], and float32 weights, 0 where there is nothing."""
        return batch["targets"], (target_segments(batch) > 0).astype(jnp.float32)


def target_segments(batch: Batch) -> jax.Array:
    """The segment of each of the layout's ``targets``, int32 [batch, targets], 0 where there is nothing:
    ``target_segments`` where it has them, else ``segment_ids``."""
    return batch.get("target_segments", batch["segment_ids"])


class Reading(NamedTuple):
    """What the stacks of a model read: ``inputs`` (an encoder-decoder's decoder), and ``source`` (its encoder)."""

    inputs: Inputs
    source: Inputs | None = None


@dataclass(frozen=True)
class TokenPrediction(Objective):
    """Base class of the objectives whose targets are tokens, one at each of some positions; ``whole_rows`` says that
    these may be anywhere in the row."""

    whole_rows: ClassVar[bool] = False

    z_loss: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the squared log-normaliser, which keeps logits near zero (Chowdhery et al. 2022: 1e-4)."""
    label_smoothing: Annotated[float, BELOW_ONE] = 0.0
    """Share of each target's probability that is spread over the vocabulary."""

    @abc.abstractmethod
    def reading(self, spec: ModelSpec, batch: Batch) -> Reading:
        """What the model reads of a batch."""

    def at_targets(self, hidden: jax.Array, batch: Batch) -> jax.Array:
        """The hidden states [batch, length, embed] from which targets are predicted, [batch, targets, embed]: all."""
        return hidden

    def loss(
        self, spec: ModelSpec, params: Params, batch: Batch, *, key: jax.Array | None = None, remat: Remat = "none"
    ) -> LossSums:
        """The sums of the cross-entropies, with z-loss and label smoothing."""
        losses = functools.partial(vocabulary_loss, z_loss=self.z_loss, label_smoothing=self.label_smoothing)
        return self.token_loss(losses, spec, params, batch, key=key, remat=remat)

    def token_loss(
        self,
        losses: TokenLoss,
        spec: ModelSpec,
        params: Params,
        batch: Batch,
        *,
        key: jax.Array | None = None,
        remat: Remat = "none",
    ) -> LossSums:
        """The same with other ``losses`` of the targets."""
        one, two, three = (None,) * 3 if key is None else jax.random.split(key, 3)
        batch = self.weighed(batch)
        inputs, source = self.reading(spec, batch)
        score: Score = functools.partial(self.score, losses, spec, three)
        run = functools.partial(score_layers, spec, params, inputs, batch, score, whole_rows=self.whole_rows)
        if source is None:
            return run(key=one, remat=remat)
        memory, told = encode(spec, params, source, key=two, remat=remat)
        return with_told(run(memory=memory, key=one, remat=remat), told)

    def score(
        self,
        losses: TokenLoss,
        spec: ModelSpec,
        key: jax.Array | None,
        params: Params,
        hidden: jax.Array,
        batch: Batch,
    ) -> LossSums:
        """The losses of the targets, given the hidden states [batch, length, embed]; ``key`` is for heads' dropout."""
        return losses(readout(spec, params, self.at_targets(hidden, batch)), *self.scored(batch))

    def states(self, spec: ModelSpec, params: Params, batch: Batch) -> jax.Array:
        """The hidden states [batch, targets, embed] from which a model would predict the targets."""
        inputs, source = self.reading(spec, batch)
        memory = None if source is None else encode(spec, params, source)[0]
        return self.at_targets(apply(spec, params, inputs, memory=memory).hidden, batch)


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
