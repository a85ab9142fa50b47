"""Preference optimisation: of two completions of a prompt, the one that people chose is to become the likelier."""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmx.config import NOT_NEGATIVE, POSITIVE, Within
from lmx.data.layout import Layout, Other, Piece, Row, Whole, empty_row
from lmx.errors import UserError
from lmx.kernels.cross_entropy import LossSums
from lmx.kernels.log_probabilities import log_probabilities
from lmx.models.config import ModelConfig
from lmx.models.lockstep import score_layers
from lmx.models.model import Inputs, apply, readout
from lmx.models.specs import ModelSpec, Remat
from lmx.nn.module import Params
from lmx.objectives.objective import Batch, Frozen, Objective, Targets, check_decoder
from lmx.objectives.vocabulary import Vocabulary

REFERENCE = "reference"


class Completion(NamedTuple):
    """Completions, float32 [batch, pairs] each: their log-probability, that under the reference, and their tokens."""

    logp: jax.Array
    reference: jax.Array
    tokens: jax.Array

    @property
    def gain(self) -> jax.Array:
        """What they have become likelier by, in nats."""
        return self.logp - self.reference

    @property
    def mean(self) -> jax.Array:
        """The log-probability of a token."""
        return self.logp / jnp.maximum(self.tokens, 1)


@dataclass(frozen=True)
class PreferenceLoss(abc.ABC):
    """Base class: the loss of a pair, given both completions' log-probabilities."""

    referenced: ClassVar[bool] = True

    def margin(self, chosen: Completion, rejected: Completion) -> jax.Array:
        """By how much the chosen one is ahead: above 0 the pair counts as right."""
        return chosen.gain - rejected.gain

    @abc.abstractmethod
    def losses(self, chosen: Completion, rejected: Completion) -> jax.Array:
        """float32 [batch, pairs]."""


@dataclass(frozen=True)
class Dpo(PreferenceLoss):
    """``-log sigmoid(beta * margin)`` (Rafailov et al. 2023, eq. 7)."""

    beta: Annotated[float, POSITIVE] = 0.1
    """How firmly the model is held to the reference."""
    label_smoothing: Annotated[float, Within(0, 0.5, below=True)] = 0.0
    """Share of the pairs that are held to be labelled the wrong way (Mitchell 2023, conservative DPO)."""

    def losses(self, chosen: Completion, rejected: Completion) -> jax.Array:
        """See the class."""
        margin = self.beta * self.margin(chosen, rejected)
        right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong


@dataclass(frozen=True)
class Ipo(PreferenceLoss):
    """``(margin - 1 / (2 * tau))^2`` (Azar et al. 2023, eq. 17)."""

    tau: Annotated[float, POSITIVE] = 0.1
    """How firmly the model is held to the reference."""

    def losses(self, chosen: Completion, rejected: Completion) -> jax.Array:
        """See the class."""
        return jnp.square(self.margin(chosen, rejected) - 1 / (2 * self.tau))


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """``max(0, 1 - beta * margin)`` (Zhao et al. 2023, SLiC-HF, with DPO's margin: Liu et al. 2023)."""

    beta: Annotated[float, POSITIVE] = 0.1
    """How firmly the model is held to the reference."""

    def losses(self, chosen: Completion, rejected: Completion) -> jax.Array:
        """See the class."""
        return jax.nn.relu(1 - self.beta * self.margin(chosen, rejected))


@dataclass(frozen=True)
class SimPo(PreferenceLoss):
    """``-log sigmoid(beta * (mean chosen - mean rejected) - gamma)``, without a reference (Meng et al. 2024, eq. 6)."""

    referenced = False
    beta: Annotated[float, POSITIVE] = 2.0
    """Scale of the log-probability of a token."""
    gamma: Annotated[float, NOT_NEGATIVE] = 1.0
    """The margin that is asked for."""

    def margin(self, chosen: Completion, rejected: Completion) -> jax.Array:
        """Between the means over the tokens."""
        return chosen.mean - rejected.mean

    def losses(self, chosen: Completion, rejected: Completion) -> jax.Array:
        """See the class."""
        return -jax.nn.log_sigmoid(self.beta * self.margin(chosen, rejected) - self.gamma)


@dataclass(frozen=True)
class Orpo(PreferenceLoss):
    """``-weight * log sigmoid(log-odds chosen - log-odds rejected)`` of the means, without a reference (Hong et al.
    2024, eq. 7); theirs is with ``likelihood`` 1 beside it."""

    referenced = False
    weight: Annotated[float, POSITIVE] = 0.1
    """Of this loss beside the likelihood's."""

    def margin(self, chosen: Completion, rejected: Completion) -> jax.Array:
        """Between the log-odds."""
        one, two = (c.mean - jnp.log1p(-jnp.exp(jnp.minimum(c.mean, -1e-6))) for c in (chosen, rejected))
        return one - two

    def losses(self, chosen: Completion, rejected: Completion) -> jax.Array:
        """See the class."""
        return -self.weight * jax.nn.log_sigmoid(self.margin(chosen, rejected))


@dataclass(frozen=True)
class Preference(Objective):
    """Learns from pairs of completions (the source Preferences). ``accuracy`` is the share of pairs in which the chosen
    one is ahead of the rejected one, against the reference where the loss has one."""

    targets: ClassVar[Targets] = "pairs"
    preference: PreferenceLoss = field(default_factory=Dpo)
    """The loss: Dpo(), Ipo(), Hinge(), SimPo() or Orpo()."""
    reference: str = ""
    """The directory of the reference model; "" is the one that training starts from, init_from."""
    likelihood: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the chosen completion's negative log-likelihood a token, beside (Pang et al. 2024; ORPO: 1)."""
    longer: Literal["truncate", "drop"] = "truncate"
    """What becomes of pairs that take more than a row: the prompt loses its first tokens, and then both completions
    their last; or they are left out. Either is counted."""

    @property
    def models(self) -> Mapping[str, str]:
        """The reference, if the loss has one."""
        return {REFERENCE: self.reference} if self.preference.referenced else {}

    def check(self, model: ModelConfig, length: int) -> None:
        """A decoder without an encoder fits."""
        if check_decoder(model, "Preference").encoder is not None:
            raise UserError(
                f"objective Preference compares completions of a decoder, and a {model.family} has an encoder"
            )

    def layout(self, vocabulary: Vocabulary, spec: ModelSpec, length: int) -> Layout:
        """Both completions of a pair, each after its prompt, in one row."""
        return PreferenceRows(length, self.longer)

    def loss(
        self, spec: ModelSpec, params: Params, batch: Batch, *, key: jax.Array | None = None, remat: Remat = "none"
    ) -> LossSums:
        """The sums over pairs of a loss that has no reference. Raises UserError for one that has."""
        return self.loss_with({})(spec, params, batch, key=key, remat=remat)

    def loss_with(self, models: Mapping[str, Frozen]) -> Callable[..., LossSums]:
        """The sums over pairs: ``nll`` those of the pairs' losses."""
        if self.preference.referenced and REFERENCE not in models:
            raise UserError(
                f"{type(self.preference).__name__} compares with a reference: give one, or use SimPo or Orpo"
            )
        return functools.partial(self._compared, models.get(REFERENCE))

    def _compared(
        self,
        reference: Frozen | None,
        spec: ModelSpec,
        params: Params,
        batch: Batch,
        *,
        key: jax.Array | None = None,
        remat: Remat = "none",
    ) -> LossSums:
        inputs = Inputs(batch["tokens"], batch["positions"], batch["segment_ids"])
        before = jnp.zeros(batch["tokens"].shape, jnp.float32)
        if reference is not None:
            hidden = apply(reference.spec, reference.params, inputs).hidden
            before = log_probabilities(readout(reference.spec, reference.params, hidden), batch["targets"])
        batch = {**batch, REFERENCE: jax.lax.stop_gradient(before)}
        score = functools.partial(self._score, spec)
        return score_layers(spec, params, inputs, batch, score, key=key, remat=remat, whole_rows=True)

    def _score(self, spec: ModelSpec, params: Params, hidden: jax.Array, batch: Batch) -> LossSums:
        logps = log_probabilities(readout(spec, params, hidden), batch["targets"])
        sums = [
            by_segment(a, batch["target_segments"]) for a in (logps, batch[REFERENCE], jnp.ones_like(batch[REFERENCE]))
        ]
        chosen, rejected = (Completion(*(a[:, first::2] for a in sums)) for first in (0, 1))
        real = (rejected.tokens > 0).astype(jnp.float32)
        losses = self.preference.losses(chosen, rejected) - self.likelihood * chosen.mean
        margin = self.preference.margin(chosen, rejected)
        total, pairs = (losses * real).sum(), real.sum()
        told = {"margin": (margin * real).sum(), "chosen_logp": (chosen.mean * real).sum()}
        told["rejected_logp"] = (rejected.mean * real).sum()
        detached = jax.lax.stop_gradient((total, ((margin > 0) * real).sum(), told))
        return LossSums(total, detached[0], pairs, detached[1], {"metrics": detached[2]})


def by_segment(values: jax.Array, segments: jax.Array) -> jax.Array:
    """The sums of float32 values [batch, length] over segments 1, 2, ...: [batch, length], of an even length one more
    than there can be segments; int32 ``segments`` [batch, length], 0 for none."""
    rows, length = values.shape
    found = jnp.zeros((rows, length + 1 + length % 2), values.dtype)
    return found.at[jnp.arange(rows)[:, None], segments].add(values)[:, 1:]


@dataclass(frozen=True)
class PreferenceRows(Layout):
    """int32 [length]: ``tokens``, ``targets``, ``segment_ids``, ``positions`` as for next tokens: pair i (from 0) is
    segments 2i + 1 (chosen) and 2i + 2; ``target_segments``, 0 in prompts."""

    longer: str = "truncate"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Pairs of completions."""
        return ("preferences",)

    @property
    def identity(self) -> tuple[object, ...]:
        """What becomes of what is too long."""
        return "preferences", self.longer

    @property
    def whole(self) -> Whole:
        """Both streams, whose last tokens are only predicted."""
        return Whole(lambda prompt, both: 2 * prompt + both - 2, self.longer)

    def invented_labels(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Where the rejected completion begins."""
        return np.array([max(1, count // 2)], np.int32)

    def empty(self) -> Row:
        """All zero."""
        return {**empty_row(self.length), "target_segments": np.zeros(self.length, np.int32)}

    def row(self, pieces: Sequence[Piece], rng: np.random.Generator, other: Other) -> Row:
        """The pairs, in order."""
        row, at, segment = self.empty(), 0, 0
        for piece in pieces:
            for prompt, completion in self._pair(piece):
                segment += 1
                stream, count = np.concatenate([prompt, completion]), len(prompt) + len(completion) - 1
                place = slice(at, at + count)
                row["tokens"][place], row["targets"][place] = stream[:-1], stream[1:]
                row["segment_ids"][place], row["positions"][place] = segment, np.arange(count)
                row["target_segments"][at + len(prompt) - 1 : at + count] = segment
                at += count
        return row

    def _pair(self, piece: Piece) -> list[tuple[np.ndarray, np.ndarray]]:
        """(prompt, completion) of the chosen and of the rejected one, cut to a row."""
        assert piece.target is not None, "the documents are no examples"
        assert piece.labels is not None, "the examples have no labels"
        prompt, (chosen, rejected) = piece.tokens, np.split(piece.target, [int(piece.labels[0])])
        room = self.length + 2 - len(chosen) - len(rejected)
        prompt = prompt[-max(1, room // 2) :]
        each = (self.length + 2) // 2 - len(prompt)
        if room // 2 < 1:
            chosen, rejected = chosen[:each], rejected[:each]
        return [(prompt, chosen), (prompt, rejected)]
