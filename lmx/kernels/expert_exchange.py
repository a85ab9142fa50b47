"""The exchange of rows between devices that own different experts: there, through the experts, and back.

Used inside a region that is manual over the mesh axes of the experts (``lmx.nn.expert_parallel``). Two forms of one
thing, by the platform of the mesh:

- ``Ragged``, on TPUs and GPUs: ``jax.lax.ragged_all_to_all``. Only rows that exist travel, and they arrive sorted by
  expert, since each (device, expert) pair is a slice of its own.
- ``Padded``, on CPU, where XLA has no ragged form: an all-to-all of equal parts, some of whose rows hold nothing.

No row is ever dropped. How many come is known on the devices only, and buffers have static sizes; for the worst case,
all rows on one device, they would be ``devices`` times as large as for the balanced one. So a device takes at most
``slack`` times the balanced load at once, and what is beyond goes in further rounds, as many as the fullest device
needs: a loop that a fair router never enters. Those rounds keep nothing for the backward pass and compute their inside
again. The memory is that of one round: ``slack * rows`` rows received, and what ``apply`` makes of them.
"""

import abc
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from lmx.kernels.moving import move
from lmx.sharding.collectives import RARE

Axes = tuple[str, ...]
Apply = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""(parameters, rows [n, in] sorted by own expert, int32 sizes [own experts]) -> [n, out]; rows past the sum of the
sizes hold anything, and must be read by nobody."""
ROOM = 256
"""Rows that a device takes at once without asking: below that, rounds save nothing."""


@dataclass(frozen=True)
class Exchange(abc.ABC):
    """How rows go to the devices along ``axes``, which own equal runs of the experts in their order.

    ``at_once`` is the static bound of a round, in rows: what a device takes (ragged), or takes of each other (padded).
    """

    axes: Axes
    at_once: int

    @abc.abstractmethod
    def rounds(self, counts: jax.Array) -> jax.Array:
        """int32 scalar: how many rounds it takes with int32 ``counts`` [devices, experts]."""

    @abc.abstractmethod
    def round(self, apply: Apply, number: Any, counts: jax.Array, params: Any, x: jax.Array) -> jax.Array:
        """The results [rows, out] for the rows [rows, in] of this round, 0 for the others."""


def through_experts(
    apply: Apply, params: Any, x: jax.Array, sizes: jax.Array, *, axes: Axes, most: int, slack: float, ragged: bool
) -> jax.Array:
    """``apply`` to every row on the device that owns its expert.

    Args:
      apply: what the experts do.
      params: of this device's experts.
      x: [rows, in], sorted by expert.
      sizes: int32 [experts], rows for each; their sum is at most ``rows``.
      axes: mesh axes that the experts are spread over; the region around must be manual over them.
      most: rows, at most, that one device can send to one other.
      slack: rows that a device takes at once, relative to the balanced load.
      ragged: whether the platform has the ragged form.

    Returns:
      [rows, out] in the order of ``x``; rows past the sum of the sizes hold 0. Differentiable in ``params`` and ``x``.
    """
    devices, rows = jax.lax.axis_size(axes), x.shape[0]
    if ragged:
        worst = devices * most
        plan: Exchange = Ragged(axes, min(worst, max(ROOM, math.ceil(slack * rows))))
    else:
        worst = most
        plan = Padded(axes, min(worst, max(ROOM // devices, math.ceil(slack * rows / devices))))
    counts = jax.lax.all_gather(sizes.astype(jnp.int32), axes)
    step = functools.partial(plan.round, apply)
    first = step(0, counts, params, x)
    if plan.at_once >= worst:
        return first
    with jax.named_scope(RARE):
        return first + _further(step, plan.rounds(counts), counts, params, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further(step: Any, rounds: jax.Array, counts: jax.Array, params: Any, x: jax.Array) -> jax.Array:
    """The sum of the rounds after the first."""
    shape = jax.eval_shape(step, 1, counts, params, x)
    start = jnp.zeros(shape.shape, shape.dtype)
    return cast(jax.Array, jax.lax.fori_loop(1, rounds, lambda r, y: y + step(r, counts, params, x), start))


def _further_forward(step: Any, rounds: jax.Array, counts: jax.Array, params: Any, x: jax.Array) -> Any:
    return _further(step, rounds, counts, params, x), (rounds, counts, params, x)


def _further_backward(step: Any, kept: Any, d_y: jax.Array) -> Any:
    rounds, counts, params, x = kept

    def add(r: jax.Array, total: Any) -> Any:
        back = jax.vjp(lambda p, x: step(r, counts, p, x), params, x)[1]
        return jax.tree.map(lambda s, d: s + d.astype(s.dtype), total, back(d_y))

    start = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), params), jnp.zeros_like(x)
    d_params, d_x = jax.lax.fori_loop(1, rounds, add, start)
    return None, None, jax.tree.map(lambda d, p: d.astype(p.dtype), d_params, params), d_x


_further.defvjp(_further_forward, _further_backward)


def _before(sizes: jax.Array, axis: int) -> jax.Array:
    """Exclusive cumulative sums."""
    return jnp.cumsum(sizes, axis) - sizes


@dataclass(frozen=True)
class Slices:
    """Where the rows of each (sender, expert) lie, int32 [devices, experts] each: how many rows of this round, from
    which row of the sender's, to which row of the receiver's buffer."""

    size: jax.Array
    start: jax.Array
    place: jax.Array


class Ragged(Exchange):
    """Each round takes the next ``at_once`` rows of every receiver, in the order of its experts, then of the senders.

    The bytes sent are those of the rows that exist.
    """

    def rounds(self, counts: jax.Array) -> jax.Array:
        """See :class:`Exchange`."""
        return -(-counts.sum(0).reshape(counts.shape[0], -1).sum(1).max() // self.at_once)

    def round(self, apply: Apply, number: Any, counts: jax.Array, params: Any, x: jax.Array) -> jax.Array:
        """See :class:`Exchange`."""
        devices, me = counts.shape[0], jax.lax.axis_index(self.axes)
        slices = self._slices(counts, number)
        of_mine = jax.tree.map(lambda a: a.reshape(devices, devices, -1)[:, me].reshape(-1), vars(slices))
        out, here = Slices(**jax.tree.map(lambda a: a[me], vars(slices))), Slices(**of_mine)
        there = (out.start, out.size, out.place, here.size)
        back = (here.place, here.size, here.start, out.size)
        received = _sent(self.axes, self.at_once, x, there, back)
        y = apply(params, received, here.size.reshape(devices, -1).sum(0))
        return _sent(self.axes, x.shape[0], y, back, there)

    def _slices(self, counts: jax.Array, number: Any) -> Slices:
        devices, experts = counts.shape
        of_owner = _before(counts.sum(0).reshape(devices, -1), 1).reshape(experts)
        arrival, low = of_owner + _before(counts, 0), number * self.at_once
        first, last = (jnp.clip(a, low, low + self.at_once) for a in (arrival, arrival + counts))
        return Slices(last - first, _before(counts, 1) + first - arrival, first - low)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sent(axes: Axes, rows: int, x: jax.Array, there: Any, back: Any) -> jax.Array:
    """Slices of ``x`` [any, embed] -> [rows, embed] on their receivers, 0 where nothing comes; ``back`` is the inverse.

    ``there`` and ``back``: the starts and sizes of what is sent, where it goes, and the sizes of what comes.
    """
    return jax.lax.ragged_all_to_all(x, jnp.zeros((rows, x.shape[1]), x.dtype), *there, axis_name=axes)


def _sent_forward(axes: Axes, rows: int, x: jax.Array, there: Any, back: Any) -> Any:
    return _sent(axes, rows, x, there, back), (x, there, back)


def _sent_backward(axes: Axes, rows: int, kept: Any, d_out: jax.Array) -> Any:
    x, there, back = kept
    return _sent(axes, x.shape[0], d_out, back, there), None, None


_sent.defvjp(_sent_forward, _sent_backward)


class Padded(Exchange):
    """Each round takes the next ``at_once`` rows of every pair of devices, in the order of their experts.

    All places are sent, those without a row too: ``slack`` times the bytes of the balanced load.
    """

    def rounds(self, counts: jax.Array) -> jax.Array:
        """See :class:`Exchange`."""
        return -(-counts.reshape(counts.shape[0], counts.shape[0], -1).sum(2).max() // self.at_once)

    def round(self, apply: Apply, number: Any, counts: jax.Array, params: Any, x: jax.Array) -> jax.Array:
        """See :class:`Exchange`."""
        devices, me = counts.shape[0], jax.lax.axis_index(self.axes)
        pairs, places = counts.reshape(devices, devices, -1), jnp.arange(self.at_once) + number * self.at_once
        out, back = self._places(pairs[me].sum(1), places, x.shape[0])
        mine = pairs[:, me]
        expert = (jnp.cumsum(mine, 1)[:, None] <= places[:, None]).sum(2).reshape(-1)
        order = jnp.argsort(expert, stable=True)
        swap = functools.partial(jax.lax.all_to_all, axis_name=self.axes, split_axis=0, concat_axis=0, tiled=True)
        received = move(swap(move(x, out, back)), order, jnp.argsort(order))
        y = apply(params, received, jnp.bincount(expert, length=mine.shape[1]))
        return move(swap(move(y, jnp.argsort(order), order)), back, out)

    def _places(self, sizes: jax.Array, places: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
        """Which of my rows each place [devices * at_once] holds, and the place of each row; the end for none."""
        starts, ends = _before(sizes, 0), jnp.cumsum(sizes)
        row = starts[:, None] + places
        out = jnp.where(row < ends[:, None], row, rows).reshape(-1)
        own = jnp.arange(rows)
        device = (ends <= own[:, None]).sum(1)
        place = own - starts.at[device].get(mode="fill", fill_value=0) - places[0]
        taken = (device < sizes.size) & (place >= 0) & (place < self.at_once)
        return out, jnp.where(taken, device * self.at_once + place, out.size)
