"""Routers: which experts a token goes to, and with what weights. Computed in float32 whatever the model's dtype."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lmx.errors import UserError
from lmx.nn.module import Declarations, parameter


@dataclass(frozen=True)
class Routing:
    """A router's choices for tokens [...] (any leading axes).

    Attributes:
      experts: int32 [..., k], the best first; all different.
      weights: float32 [..., k], of the chosen experts' outputs.
      probabilities: float32 [..., experts], summing to 1: what the load-balancing loss moves.
      logits: float32 [..., experts].
    """

    experts: jax.Array
    weights: jax.Array
    probabilities: jax.Array
    logits: jax.Array


@dataclass(frozen=True)
class Router(abc.ABC):
    """Base class of the routers' specs. Ties go to the expert of the lower number."""

    k: int = 2
    """Experts for each token."""
    bias: bool = False
    """Whether the logits have a bias."""

    corrected: ClassVar[bool] = False
    """Whether the choice has a correction that a rule moves, not the gradient."""

    def check(self, experts: int) -> None:
        """Raises UserError if this router cannot choose among so many experts."""
        if not 1 <= self.k <= experts:
            raise UserError(f"a router of k={self.k} cannot choose among {experts} experts; set k to 1 to {experts}")

    def moved(self, correction: jax.Array, load: jax.Array) -> jax.Array:
        """The correction [..., experts] after a train step in which each expert had the share ``load`` of choices."""
        return correction

    @abc.abstractmethod
    def choose(self, logits: jax.Array, correction: jax.Array | None) -> Routing:
        """Routes by float32 logits [..., experts]; ``correction`` is float32 [experts] where there is one."""

    @abc.abstractmethod
    def margin(self, logits: jax.Array, correction: jax.Array | None) -> jax.Array:
        """Float32 [...]: by how much what is compared would have to change for another choice; inf without one."""


def _gap(scores: jax.Array, k: int) -> jax.Array:
    """Between the last of the k best of [..., n] and the next; inf where there is none."""
    if k == scores.shape[-1]:
        return jnp.full(scores.shape[:-1], jnp.inf)
    best = jax.lax.top_k(scores, k + 1)[0]
    return best[..., k - 1] - best[..., k]


@dataclass(frozen=True)
class SoftmaxRouter(Router):
    """The softmax over all experts, then the k best (Shazeer et al. 2017; Fedus et al. 2021).

    Renormalised, the weights of the chosen sum to 1 (Mixtral, most Qwen3-MoE); that equals a softmax over the chosen
    logits alone, as GPT-OSS computes it.
    """

    renormalise: bool = True

    def choose(self, logits: jax.Array, correction: jax.Array | None) -> Routing:
        """See :class:`Router`."""
        probabilities = jax.nn.softmax(logits, axis=-1)
        best, experts = jax.lax.top_k(logits, self.k)
        chosen = jnp.take_along_axis(probabilities, experts, axis=-1)
        weights = jax.nn.softmax(best, axis=-1) if self.renormalise else chosen
        return Routing(experts, weights, probabilities, logits)

    def margin(self, logits: jax.Array, correction: jax.Array | None) -> jax.Array:
        """See :class:`Router`."""
        return _gap(logits, self.k)


@dataclass(frozen=True)
class SigmoidRouter(Router):
    """DeepSeek-V3's router (DeepSeek-AI 2024, section 2.1.2).

    An expert's score is the sigmoid of its logit. The choice is by score plus correction, limited to the
    ``top_groups`` groups of experts whose two best such sums add up to most; the weights are the chosen experts'
    scores without correction, times ``scale``. After each train step the correction of an expert with less than the
    mean load grows by ``speed``, and shrinks with more.
    """

    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    renormalise: bool = True
    """Divide the weights by their sum before they are scaled."""
    speed: float = 1e-3

    corrected: ClassVar[bool] = True

    def check(self, experts: int) -> None:
        """See :class:`Router`."""
        super().check(experts)
        if self.groups < 1 or experts % self.groups:
            raise UserError(f"{experts} experts do not make {self.groups} equal groups; choose groups that divide them")
        reach = self.top_groups * experts // self.groups
        if not 1 <= self.top_groups <= self.groups or reach < self.k:
            raise UserError(
                f"a router of top_groups={self.top_groups} reaches {reach} of {experts} experts in {self.groups} "
                f"groups and needs k={self.k}; set top_groups to at most {self.groups} groups that hold k experts"
            )

    def moved(self, correction: jax.Array, load: jax.Array) -> jax.Array:
        """See :class:`Router`."""
        return correction + self.speed * jnp.sign(load.mean(-1, keepdims=True) - load)

    def choose(self, logits: jax.Array, correction: jax.Array | None) -> Routing:
        """See :class:`Router`."""
        scores = jax.nn.sigmoid(logits)
        corrected = scores if correction is None else scores + correction
        experts = jax.lax.top_k(self._within_groups(jax.lax.stop_gradient(corrected)), self.k)[1]
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        probabilities = scores / (scores.sum(-1, keepdims=True) + 1e-20)
        return Routing(experts, weights * self.scale, probabilities, logits)

    def margin(self, logits: jax.Array, correction: jax.Array | None) -> jax.Array:
        """See :class:`Router`."""
        scores = jax.nn.sigmoid(logits) + (0 if correction is None else correction)
        return jnp.minimum(_gap(self._within_groups(scores), self.k), _gap(self._of_groups(scores), self.top_groups))

    def _of_groups(self, scores: jax.Array) -> jax.Array:
        """The two best scores of each group, summed: [..., groups]."""
        grouped = scores.reshape(*scores.shape[:-1], self.groups, -1)
        return jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)

    def _within_groups(self, scores: jax.Array) -> jax.Array:
        """The scores, with minus infinity outside the best groups."""
        grouped = scores.reshape(*scores.shape[:-1], self.groups, -1)
        best = jax.lax.top_k(self._of_groups(scores), self.top_groups)[1]
        allowed = jax.nn.one_hot(best, self.groups, dtype=bool).any(-2)
        return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(scores.shape)


class RouterModule(nnx.Module):
    """Hidden states [..., embed] -> Routing.

    No axis is sharded over experts: every token needs the logits of all.
    """

    def __init__(self, spec: Router, width: int, experts: int, std: float, declared: Declarations):
        self.spec = spec
        zeros = nnx.initializers.zeros
        self.kernel = parameter(declared, (width, experts), ("embed", None), nnx.initializers.normal(std))
        self.bias = parameter(declared, (experts,), (None,), zeros) if spec.bias else None
        self.correction = parameter(declared, (experts,), (None,), zeros) if spec.corrected else None

    def __call__(self, x: jax.Array) -> Routing:
        return self.spec.choose(*self._scored(x))

    def margin(self, x: jax.Array) -> jax.Array:
        """Float32 [...]: how far each choice is from another; see :meth:`Router.margin`."""
        return self.spec.margin(*self._scored(x))

    def _scored(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        # The highest precision: on TPUs a float32 product is bfloat16 otherwise, and near ties choose other experts.
        kernel = self.kernel[...].astype(jnp.float32)
        logits = jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
        if self.bias is not None:
            logits = logits + self.bias[...].astype(jnp.float32)
        if self.correction is None:
            return logits, None
        return logits, jax.lax.stop_gradient(self.correction[...].astype(jnp.float32))
