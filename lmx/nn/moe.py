"""Mixture of experts: each token goes through the few feed-forward layers that a router chooses for it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from lmx.nn.activation import Gating, Glu
from lmx.nn.context import Context, SublayerOutput
from lmx.nn.dispatch import Dispatch, Dropless
from lmx.nn.experts import Experts
from lmx.nn.mlp import Mlp, MlpModule
from lmx.nn.module import Declarations, Params, Part, dropout
from lmx.nn.router import Router, RouterModule, Routing, SoftmaxRouter
from lmx.nn.sublayer import Sublayer
from lmx.sharding.rules import total


@dataclass(frozen=True)
class Moe(Sublayer):
    """``sum over the chosen experts e of weight_e * down_e(gating(gate_e(x), up_e(x)))``, plus shared experts."""

    experts: int = 8
    hidden: int = 14336
    """Hidden units of an expert."""
    router: Router = field(default_factory=SoftmaxRouter)
    gating: Gating = field(default_factory=Glu)
    bias: bool = False
    """Biases on the experts' gate, up and down maps."""
    shared: int = 0
    """Hidden units of the gated layer that every token goes through (DeepSeek); 0 for none."""
    dispatch: Dispatch = field(default_factory=Dropless)
    balance_loss: float = 0.0
    """Coefficient of the load-balancing loss (see :func:`balance_loss`)."""
    z_loss: float = 0.0
    """Coefficient of the router's z-loss (see :func:`z_loss`)."""

    def __post_init__(self) -> None:
        self.router.check(self.experts)
        self.dispatch.check()

    @property
    def name(self) -> str:
        """The sublayer's key in the parameters."""
        return "moe"

    def inner(self, width: int) -> Part:
        """The module for inputs [batch, length, width]."""
        return Part(functools.partial(MoeModule, self, width))

    def by_rows(self, training: bool) -> str:
        """What the dispatch says."""
        return self.dispatch.by_rows

    def used(self, name: str) -> float:
        """k of the experts; all of the router and of the shared experts."""
        return self.router.k / self.experts if name.startswith("experts/") else 1.0

    def stepped(self, params: Params, told: Mapping[str, jax.Array]) -> Params:
        """Moves the router's correction, where it has one, by the ``load`` of the step."""
        router = params["router"]
        if "correction" not in router:
            return params
        return {**params, "router": {**router, "correction": self.router.moved(router["correction"], told["load"])}}


class MoeModule(nnx.Module):
    """[batch, length, embed] -> [batch, length, embed], and of the tokens that are not padding ``aux``, float32.

    ``loss``: the router's losses, times their coefficients; ``load`` [experts]: the share of the choices that each
    expert was given; ``dropped``: the share of the choices that went to no expert for want of capacity.
    """

    def __init__(self, spec: Moe, width: int, declared: Declarations):
        self.spec = spec
        self.router = RouterModule(spec.router, width, spec.experts, spec.std, declared)
        stds = {"std": spec.std, "out_std": spec.out_std}
        self.experts = Experts(
            spec.experts, width, spec.hidden, gating=spec.gating, bias=spec.bias, declared=declared, **stds
        )
        shared = Mlp(hidden=spec.shared, activation=spec.gating, std=spec.std, out_std=spec.out_std)
        self.shared = MlpModule(shared, width, declared) if spec.shared else None

    def __call__(self, x: jax.Array, context: Context) -> SublayerOutput:
        spec, real = self.spec, context.segments > 0
        routing = self.router(x)
        choices = jnp.where(real[..., None], routing.experts, spec.experts)
        mixed = spec.dispatch.mixed(self.experts, x, choices, routing.weights)
        hidden = mixed.hidden
        if self.shared is not None:
            hidden = hidden + self.shared(x, context).hidden
        aux = _told(spec, routing, choices, real, mixed.dropped)
        return SublayerOutput(dropout(hidden, spec.dropout, context.fold(0).key), aux=aux)


def _told(spec: Moe, routing: Routing, choices: jax.Array, real: jax.Array, dropped: jax.Array) -> dict[str, jax.Array]:
    count = _count(real)
    # Not bincount, for which the compiler would gather the choices of all devices.
    chosen = (choices[..., None] == jnp.arange(spec.experts)).sum((0, 1, 2), dtype=jnp.float32)
    load = total(chosen, "act_length") / (count * spec.router.k)
    loss = jnp.float32(0)
    if spec.balance_loss:
        loss += spec.balance_loss * balance_loss(routing, load, real)
    if spec.z_loss:
        loss += spec.z_loss * z_loss(routing, real)
    return {"loss": loss, "load": load, "dropped": total(dropped, "act_length") / (count * spec.router.k)}


def _count(real: jax.Array) -> jax.Array:
    """The tokens that are not padding, those of the other parts of a split length too; at least 1."""
    return jnp.maximum(total(real.sum(dtype=jnp.float32), "act_length"), 1)


def balance_loss(routing: Routing, load: jax.Array, real: jax.Array) -> jax.Array:
    """``experts * k * sum(load * mean probability)``: k where all are equal (Fedus et al. 2021, eq. 4, for k choices).

    Args:
      routing: of tokens [batch, length].
      load: float32 [experts], each expert's share of the choices; it carries no gradient.
      real: bool [batch, length], False for padding.
    """
    probabilities = jnp.where(real[..., None], routing.probabilities, 0).sum((0, 1))
    mean = total(probabilities, "act_length") / _count(real)
    return routing.experts.shape[-1] * load.size * (load * mean).sum()


def z_loss(routing: Routing, real: jax.Array) -> jax.Array:
    """The mean of ``logsumexp(logits)^2`` over the tokens that are not padding (Zoph et al. 2022, eq. 5)."""
    squares = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))
    return total(jnp.where(real, squares, 0).sum(), "act_length") / _count(real)
