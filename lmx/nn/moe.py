"""Mixture of experts: each token goes through the few feed-forward layers that a router chooses for it."""

import abc
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmx.errors import UserError
from lmx.kernels.grouped_matmul import grouped_matmul
from lmx.nn.activation import Gating, Glu
from lmx.nn.context import Context, SublayerOutput
from lmx.nn.mlp import Mlp, MlpModule
from lmx.nn.module import Params, Part, dropout, parameter
from lmx.nn.router import Router, RouterModule, Routing, SoftmaxRouter
from lmx.nn.sublayer import Sublayer
from lmx.sharding.rules import LogicalAxes, constrain

TOKENS = ("act_batch", "act_length", "act_embed")


class Rows(abc.ABC):
    """Copies of the tokens, one for each choice of an expert that is honoured, laid out by expert."""

    hidden: jax.Array
    """[..., embed]."""
    dropped: jax.Array
    """Float32 scalar: choices that are not honoured."""

    @abc.abstractmethod
    def matmul(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Each row [..., in] times its expert's kernel of [experts, in, out]: [..., out]."""

    @abc.abstractmethod
    def spread(self, bias: jax.Array) -> jax.Array:
        """Each row's expert's bias of [experts, out]: broadcasts to [..., out]."""

    @abc.abstractmethod
    def collect(self, y: jax.Array) -> jax.Array:
        """Rows [..., embed] back to their tokens' choices [batch, length, k, embed]; 0 where there is no row."""


@dataclass(frozen=True)
class Dispatch(abc.ABC):
    """Base class: how tokens come to their experts."""

    @abc.abstractmethod
    def rows(self, x: jax.Array, choices: jax.Array, experts: int) -> Rows:
        """The rows for hidden states [batch, length, embed] with int32 choices [batch, length, k].

        A choice equal to ``experts`` is nobody's (padding): it takes no row.
        """


@dataclass(frozen=True)
class Dropless(Dispatch):
    """Every choice is honoured: rows are sorted by expert and go through a grouped matmul (Gale et al. 2022)."""

    def rows(self, x: jax.Array, choices: jax.Array, experts: int) -> Rows:
        """See :class:`Dispatch`."""
        return SortedRows(x, choices, experts)


@dataclass(frozen=True)
class Capacity(Dispatch):
    """Each expert takes at most ceil(factor * length * k / experts) choices of a sequence, the first in its order.

    A token whose choice is dropped keeps what its other choices and the residual stream give it. Sequences are
    the groups of Lepikhin et al. 2020 (GShard, section 3.2): what is dropped depends neither on the mesh nor on the
    rest of the batch, and within a sequence never on later positions.
    """

    factor: float = 1.25

    def rows(self, x: jax.Array, choices: jax.Array, experts: int) -> Rows:
        """See :class:`Dispatch`."""
        return PaddedRows(x, choices, experts, math.ceil(self.factor * choices[0].size / experts))


@jax.custom_vjp
def move(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
    """``out[i] = x[there[i]]``, 0 where the index is past the end; ``back`` is the inverse, so that both ways gather.

    Args:
      x: [n, embed].
      there: int32 [m], each row at most once, n for none.
      back: int32 [n]: where each row of ``x`` went, m for nowhere.
    """
    return x.at[there].get(mode="fill", fill_value=0)


def _move_forward(x: jax.Array, there: jax.Array, back: jax.Array) -> Any:
    return move(x, there, back), back


def _move_backward(back: jax.Array, d_out: jax.Array) -> Any:
    return d_out.at[back].get(mode="fill", fill_value=0), None, None


move.defvjp(_move_forward, _move_backward)


class SortedRows(Rows):
    """All choices of the batch, [batch * length * k, embed], sorted by expert; padding's come last and hold 0."""

    def __init__(self, x: jax.Array, choices: jax.Array, experts: int):
        self.shape = (*choices.shape, x.shape[-1])
        flat = choices.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        self.expert = flat[order]
        self.there = jnp.where(self.expert < experts, order, flat.size)
        self.back = jnp.where(flat < experts, jnp.argsort(order), flat.size)
        self.sizes = jnp.bincount(flat, length=experts)
        copies = jnp.broadcast_to(x[:, :, None], self.shape).reshape(flat.size, -1)
        self.hidden = move(copies, self.there, self.back)
        self.dropped = jnp.float32(0)

    def matmul(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return grouped_matmul(x, kernel, self.sizes)

    def spread(self, bias: jax.Array) -> jax.Array:
        return bias.at[self.expert].get(mode="fill", fill_value=0)

    def collect(self, y: jax.Array) -> jax.Array:
        return move(y, self.back, self.there).reshape(self.shape)


class PaddedRows(Rows):
    """The choices of each sequence, [batch, experts, capacity, embed]; empty places hold 0."""

    def __init__(self, x: jax.Array, choices: jax.Array, experts: int, capacity: int):
        self.shape, self.experts = (*choices.shape, x.shape[-1]), experts
        flat = choices.reshape(choices.shape[0], -1)
        self.there, self.back = jax.vmap(functools.partial(_places, experts=experts, capacity=capacity))(flat)
        copies = jnp.broadcast_to(x[:, :, None], self.shape).reshape(*flat.shape, -1)
        hidden = jax.vmap(move)(copies, self.there, self.back)
        self.hidden = self._laid(hidden.reshape(flat.shape[0], experts, capacity, -1))
        self.dropped = ((flat < experts) & (self.back == experts * capacity)).sum(dtype=jnp.float32)

    def _laid(self, x: jax.Array) -> jax.Array:
        return constrain(x, ("act_expert_batch", "act_expert", None, None))

    def matmul(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return self._laid(jnp.einsum("beci,eio->beco", x, kernel))

    def spread(self, bias: jax.Array) -> jax.Array:
        return bias[:, None]

    def collect(self, y: jax.Array) -> jax.Array:
        return jax.vmap(move)(y.reshape(y.shape[0], -1, y.shape[-1]), self.back, self.there).reshape(self.shape)


def _places(choices: jax.Array, experts: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """For one sequence's choices [n]: which choice each place [experts * capacity] holds, and each choice's place."""
    order = jnp.argsort(choices, stable=True)
    sizes = jnp.bincount(choices, length=experts)
    starts = jnp.cumsum(sizes) - sizes
    place = jnp.arange(capacity)
    held = order.at[starts[:, None] + place].get(mode="fill", fill_value=0)
    there = jnp.where(place < sizes[:, None], held, choices.size).reshape(-1)
    rank = jnp.argsort(order) - starts.at[choices].get(mode="fill", fill_value=0)
    kept = (choices < experts) & (rank < capacity)
    return there, jnp.where(kept, choices * capacity + rank, experts * capacity)


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
        if isinstance(self.dispatch, Capacity) and not self.dispatch.factor > 0:
            raise UserError(f"a capacity factor must be above 0, not {self.dispatch.factor}; 1.25 is usual")

    @property
    def name(self) -> str:
        """The sublayer's key in the parameters."""
        return "moe"

    def inner(self, width: int) -> Part:
        """The module for inputs [batch, length, width]."""
        return Part(functools.partial(MoeModule, self, width))

    def used(self, name: str) -> float:
        """k of the experts; all of the router and of the shared experts."""
        return self.router.k / self.experts if name.startswith("experts/") else 1.0

    def stepped(self, params: Params, told: Mapping[str, jax.Array]) -> Params:
        """Moves the router's correction, where it has one, by the ``load`` of the step."""
        router = params["router"]
        if "correction" not in router:
            return params
        return {**params, "router": {**router, "correction": self.router.moved(router["correction"], told["load"])}}


class ExpertLinear(nnx.Module):
    """A linear map for each expert: kernel [experts, in, out], bias [experts, out]."""

    def __init__(self, shape: tuple[int, int, int], axes: LogicalAxes, std: float, bias: bool, rngs: nnx.Rngs):
        self.kernel = parameter(rngs, shape, axes, nnx.initializers.normal(std))
        bias_axes = ("expert", "norm" if axes[-1] == "embed" else axes[-1])
        self.bias = parameter(rngs, (shape[0], shape[2]), bias_axes, nnx.initializers.zeros) if bias else None

    def __call__(self, rows: Rows, x: jax.Array) -> jax.Array:
        y = rows.matmul(x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + rows.spread(self.bias[...].astype(x.dtype))


class Experts(nnx.Module):
    """Rows -> their experts' outputs, in the rows' layout."""

    def __init__(self, spec: Moe, width: int, rngs: nnx.Rngs):
        self.gating = spec.gating
        linear = functools.partial(ExpertLinear, bias=spec.bias, rngs=rngs)
        into, out = (spec.experts, width, spec.hidden), (spec.experts, spec.hidden, width)
        self.gate = linear(into, ("expert", "embed", "mlp"), spec.std)
        self.up = linear(into, ("expert", "embed", "mlp"), spec.std)
        self.down = linear(out, ("expert", "mlp", "embed"), spec.out_std)

    def __call__(self, rows: Rows) -> jax.Array:
        return self.down(rows, self.gating(self.gate(rows, rows.hidden), self.up(rows, rows.hidden)))


class MoeModule(nnx.Module):
    """[batch, length, embed] -> [batch, length, embed], and of the tokens that are not padding ``aux``, float32.

    ``loss``: the router's losses, times their coefficients; ``load`` [experts]: the share of the choices that each
    expert was given; ``dropped``: the share of the choices that went to no expert for want of capacity.
    """

    def __init__(self, spec: Moe, width: int, rngs: nnx.Rngs):
        self.spec = spec
        self.router = RouterModule(spec.router, width, spec.experts, spec.std, rngs)
        self.experts = Experts(spec, width, rngs)
        shared = Mlp(hidden=spec.shared, activation=spec.gating, std=spec.std, out_std=spec.out_std)
        self.shared = MlpModule(shared, width, rngs) if spec.shared else None

    def __call__(self, x: jax.Array, context: Context) -> SublayerOutput:
        spec, real = self.spec, context.segments > 0
        routing = self.router(x)
        choices = jnp.where(real[..., None], routing.experts, spec.experts)
        rows = spec.dispatch.rows(x, choices, spec.experts)
        outputs = rows.collect(self.experts(rows))
        hidden = jnp.einsum("blkd,blk->bld", outputs, routing.weights, preferred_element_type=jnp.float32)
        hidden = constrain(hidden.astype(x.dtype), TOKENS)
        if self.shared is not None:
            hidden = hidden + self.shared(x, context).hidden
        aux = _told(spec, routing, choices, real, rows.dropped)
        return SublayerOutput(dropout(hidden, spec.dropout, context.fold(0).key), aux=aux)


def _told(spec: Moe, routing: Routing, choices: jax.Array, real: jax.Array, dropped: jax.Array) -> dict[str, jax.Array]:
    count = jnp.maximum(real.sum(dtype=jnp.float32), 1)
    load = jnp.bincount(choices.reshape(-1), length=spec.experts) / (count * spec.router.k)
    loss = jnp.float32(0)
    if spec.balance_loss:
        loss += spec.balance_loss * balance_loss(routing, load, real)
    if spec.z_loss:
        loss += spec.z_loss * z_loss(routing, real)
    return {"loss": loss, "load": load, "dropped": dropped / (count * spec.router.k)}


def balance_loss(routing: Routing, load: jax.Array, real: jax.Array) -> jax.Array:
    """``experts * k * sum(load * mean probability)``: k where all are equal (Fedus et al. 2021, eq. 4, for k choices).

    Args:
      routing: of tokens [batch, length].
      load: float32 [experts], each expert's share of the choices; it carries no gradient.
      real: bool [batch, length], False for padding.
    """
    mean = jnp.where(real[..., None], routing.probabilities, 0).sum((0, 1)) / jnp.maximum(real.sum(), 1)
    return routing.experts.shape[-1] * load.size * (load * mean).sum()


def z_loss(routing: Routing, real: jax.Array) -> jax.Array:
    """The mean of ``logsumexp(logits)^2`` over the tokens that are not padding (Zoph et al. 2022, eq. 5)."""
    squares = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))
    return jnp.where(real, squares, 0).sum() / jnp.maximum(real.sum(), 1)
