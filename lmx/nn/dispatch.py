"""How tokens come to their experts: all of them (``Dropless``), or as many as an expert has places (``Capacity``)."""

import abc
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lmx.errors import UserError
from lmx.kernels.expert_exchange import through_experts
from lmx.kernels.moving import move
from lmx.nn.expert_parallel import Mixed, Place, on_each_device
from lmx.nn.experts import Experts, GroupedRows, Rows, SortedRows, split_experts
from lmx.sharding.rules import constrain


@dataclass(frozen=True)
class Dispatch(abc.ABC):
    """Base class."""

    by_rows: ClassVar[str] = ""
    """What of it goes by whole sequences; "" for nothing."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises UserError for numbers that mean nothing."""

    @abc.abstractmethod
    def mixed(self, experts: Experts, x: jax.Array, choices: jax.Array, weights: jax.Array) -> Mixed:
        """The experts' outputs for hidden states [batch, length, embed], by int32 choices and float32 weights
        [batch, length, k].

        A choice equal to the number of experts is nobody's (padding): it takes no row.
        """


@dataclass(frozen=True)
class Dropless(Dispatch):
    """Every choice is honoured: rows are sorted by expert and go through a grouped matmul (Gale et al. 2022).

    On a mesh each device sorts its own tokens, and where the experts are spread over devices, rows are exchanged with
    those that own them: see :mod:`lmx.kernels.expert_exchange`.
    """

    slack: float = 2.0
    """Rows that a device takes at once where experts are spread over devices, relative to the balanced load; what is
    beyond goes in further rounds. More takes memory, less takes time when the router is unfair."""

    def check(self) -> None:
        """See :class:`Dispatch`."""
        if not self.slack > 0:
            raise UserError(f"dropless slack must be above 0, not {self.slack}; 2 is usual")

    def mixed(self, experts: Experts, x: jax.Array, choices: jax.Array, weights: jax.Array) -> Mixed:
        """See :class:`Dispatch`."""
        return on_each_device(experts, self._here, x, choices, weights)

    def _here(self, experts: Experts, place: Place, x: jax.Array, choices: jax.Array, weights: jax.Array) -> Mixed:
        rows = SortedRows(x, choices, place.experts)
        y = self._exchanged(experts, place, rows, choices) if place.exchange else experts(rows)
        return Mixed(combined(rows.collect(y), weights), jnp.float32(0))

    def _exchanged(self, experts: Experts, place: Place, rows: SortedRows, choices: jax.Array) -> jax.Array:
        graph, params, _ = split_experts(experts)

        def apply(params: Any, hidden: jax.Array, sizes: jax.Array) -> jax.Array:
            return nnx.merge(graph, params)(GroupedRows(hidden, sizes))

        most = choices[..., 0].size * min(choices.shape[-1], experts.count)
        return through_experts(
            apply,
            params,
            rows.hidden,
            rows.sizes,
            axes=place.exchange,
            most=most,
            slack=self.slack,
            ragged=place.platform != "cpu",
        )


def combined(outputs: jax.Array, weights: jax.Array) -> jax.Array:
    """Outputs [batch, length, k, embed] summed by weight: [batch, length, embed] in their dtype."""
    total = jnp.einsum("blkd,blk->bld", outputs, weights, preferred_element_type=jnp.float32)
    return total.astype(outputs.dtype)


@dataclass(frozen=True)
class Capacity(Dispatch):
    """Each expert takes at most ceil(factor * length * k / experts) choices of a sequence, the first in its order.

    A token whose choice is dropped keeps what its other choices and the residual stream give it. Sequences are
    the groups of Lepikhin et al. 2020 (GShard, section 3.2): what is dropped depends neither on the mesh nor on the
    rest of the batch, and within a sequence never on later positions.
    """

    factor: float = 1.25

    by_rows: ClassVar[str] = "an expert's capacity"

    def check(self) -> None:
        """See :class:`Dispatch`."""
        if not self.factor > 0:
            raise UserError(f"a capacity factor must be above 0, not {self.factor}; 1.25 is usual")

    def mixed(self, experts: Experts, x: jax.Array, choices: jax.Array, weights: jax.Array) -> Mixed:
        """See :class:`Dispatch`."""
        rows = PaddedRows(x, choices, experts.count, math.ceil(self.factor * choices[0].size / experts.count))
        hidden = combined(rows.collect(experts(rows)), weights)
        return Mixed(constrain(hidden, ("act_batch", "act_length", "act_embed")), rows.dropped)


BY_SEQUENCE = ("act_batch", None, None, None)
"""Where rows lie before they go to their experts, and after: with both ends said, the way is an all-to-all."""


class PaddedRows(Rows):
    """The choices of each sequence, [batch, experts, capacity, embed]; empty places hold 0.

    ``dropped``, a float32 scalar, counts the choices that found no place.
    """

    def __init__(self, x: jax.Array, choices: jax.Array, experts: int, capacity: int):
        self.shape = (*choices.shape, x.shape[-1])
        flat = choices.reshape(choices.shape[0], -1)
        self.there, self.back = jax.vmap(functools.partial(_places, experts=experts, capacity=capacity))(flat)
        copies = jnp.broadcast_to(x[:, :, None], self.shape).reshape(*flat.shape, -1)
        hidden = jax.vmap(move)(copies, self.there, self.back).reshape(flat.shape[0], experts, capacity, -1)
        self.hidden = self._laid(constrain(hidden, BY_SEQUENCE))
        self.dropped = ((flat < experts) & (self.back == experts * capacity)).sum(dtype=jnp.float32)

    def _laid(self, x: jax.Array) -> jax.Array:
        return constrain(x, ("act_expert_batch", "act_expert", None, None))

    def matmul(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return self._laid(jnp.einsum("beci,eio->beco", x, kernel))

    def spread(self, bias: jax.Array) -> jax.Array:
        return bias[:, None]

    def collect(self, y: jax.Array) -> jax.Array:
        """Rows back to their choices [batch, length, k, embed]; 0 where there is no row."""
        y = constrain(y, BY_SEQUENCE)
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
