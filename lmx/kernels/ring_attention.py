"""Attention across the shards of a sequence: exact, in blocks, with a backward pass of its own.

Ring attention (Liu et al. 2023): the keys and values of one shard after the other come by, and a running softmax
(largest score, sum, weighted values) takes them in; the backward pass sends them around once more, with their
gradients, which so come home. With ``gathered`` keys all shards' are fetched at once, and their gradients are summed
back. Both are one program over a plan (:mod:`lmx.kernels.itinerary`): a scan over pairs of pieces in each step.

Everything here is called with local shards inside a region that is manual over the sequence's axes.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmx.kernels.itinerary import NOBODY, Trip, orders, pieces_of, plan
from lmx.kernels.scoring import (
    MASKED,
    SAVED,
    Learned,
    Scoring,
    Where,
    by_head,
    heads_first,
    heads_last,
    over_queries,
    seen,
    sinks_gradient,
)

Axes = tuple[str, ...]
"""The mesh axes that split the length."""


@dataclass(frozen=True)
class Course:
    """What the compiled program depends on beside the arrays."""

    scoring: Scoring
    axes: Axes
    trip: Trip


class Keys(NamedTuple):
    """Keys [pieces, batch, kv_heads, head_dim, piece] and values [pieces, batch, kv_heads, piece, value_dim], or
    gradients: the values' then lie as keys do."""

    key: jax.Array
    value: jax.Array


def ring_attention(
    scoring: Scoring,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    learned: Learned,
    where: Where,
    *,
    axes: Axes,
    itself: bool,
    gathered: bool = False,
) -> jax.Array:
    """Attention of the local queries to the keys of all shards, inside a region that is manual over ``axes``.

    Args:
      scoring: what becomes of the scores.
      query: [batch, query_length, heads, head_dim], already scaled; lengths are the local shard's.
      key: [batch, kv_heads, head_dim, key_length].
      value: [batch, kv_heads, key_length, value_dim].
      learned: the same on every shard. Its gradient here is this shard's part: the transposition of the region's
        inputs sums them.
      where: where they stand, local too.
      axes: the mesh axes that split the length, outermost first.
      itself: see :func:`lmx.kernels.attention.attention`.
      gathered: fetch all keys at once rather than around the ring.

    Returns:
      [batch, query_length, heads, value_dim], in the query's dtype.
    """
    shards = jax.lax.axis_size(axes)
    queries, keys = pieces_of(query.shape[1]), pieces_of(key.shape[-1])
    mask = scoring.mask if itself else None
    trip = Trip(mask, shards, queries, keys, query.shape[1] // queries, gathered)
    course = Course(scoring, axes, trip)
    rows = _pieces(heads_first(query, key.shape[1]), queries, 3)
    columns = Keys(_pieces(key, keys, 3), _pieces(value, keys, 2))
    places = _where(course, where)
    if plan(trip).zigzag:
        rows = _parted(rows, axes)
        columns = columns if gathered else Keys(*(_parted(x, axes) for x in columns))
    mixed = _attend(course, rows, columns, learned, places)
    return heads_last(_whole(_joined(mixed, axes) if plan(trip).zigzag else mixed, 3)).astype(query.dtype)


def _pieces(x: jax.Array, count: int, axis: int) -> jax.Array:
    """Cuts an axis into pieces, which come first."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :]), axis, 0)


def _whole(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of :func:`_pieces`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _halves(shards: int) -> list[list[tuple[int, int]]]:
    """From which shard to which the even and the odd halves of the row go for the zig-zag."""
    return [[(i, min(h, 2 * shards - 1 - h)) for i in range(shards) for h in [2 * i + odd]] for odd in (0, 1)]


def _parted(x: jax.Array, axes: Axes) -> jax.Array:
    """[pieces, ...] in order -> in the zig-zag: each shard sends one half to its place, and gets two."""
    even, odd = (jax.lax.ppermute(h, axes, to) for h, to in zip(jnp.split(x, 2), _halves(_size(axes)), strict=True))
    first_even = jax.lax.axis_index(axes) % 2 == 0
    return jnp.concatenate([jnp.where(first_even, even, odd), jnp.where(first_even, odd, even)])


def _joined(x: jax.Array, axes: Axes) -> jax.Array:
    """The inverse of :func:`_parted`."""
    low, high = jnp.split(x, 2)
    first_even = jax.lax.axis_index(axes) % 2 == 0
    halves = (jnp.where(first_even, low, high), jnp.where(first_even, high, low))
    back = ([(there, here) for here, there in to] for to in _halves(_size(axes)))
    return jnp.concatenate([jax.lax.ppermute(h, axes, to) for h, to in zip(halves, back, strict=True)])


def _size(axes: Axes) -> int:
    return int(jax.lax.axis_size(axes))


def _where(course: Course, where: Where) -> Where:
    """Places by piece: the queries' [pieces, batch, piece], the keys' [shards, pieces, batch, piece] as they come by.

    They are gathered for once: small beside the keys, and no step then waits for them.
    """
    trip = course.trip

    def gather(x: jax.Array, pieces: int) -> jax.Array:
        return _pieces(jax.lax.all_gather(x, course.axes, axis=1, tiled=True), trip.shards * pieces, 1)

    straight, zigzag = orders(trip.shards, trip.query_pieces)
    held = zigzag if plan(trip).zigzag else straight
    own = jnp.asarray(held)[jax.lax.axis_index(course.axes)]
    query_at, query_in = (gather(x, trip.query_pieces)[own] for x in (where.query_at, where.query_in))
    keys = orders(trip.shards, trip.key_pieces)[0] if trip.mask is None or trip.gathered else held
    rows = keys.reshape(1, -1) if trip.gathered else keys
    key_at, key_in = (gather(x, trip.key_pieces)[rows] for x in (where.key_at, where.key_in))
    return Where(query_at, key_at, query_in, key_in)


class Visit(NamedTuple):
    """One step: the keys that are here, where they stand [pieces, batch, piece], this shard's pairs, and the offset."""

    keys: Keys
    key_at: jax.Array
    key_in: jax.Array
    pairs: jax.Array
    offset: int


def _visits(course: Course, keys: Keys, where: Where) -> Iterator[Visit]:
    axes, trip, here = course.axes, course.trip, jax.lax.axis_index(course.axes)
    if trip.gathered:
        keys = Keys(*(jax.lax.all_gather(x, axes, axis=0, tiled=True) for x in keys))
    last = 0
    for step in plan(trip).steps:
        keys, last = _moved(keys, axes, step.offset - last), step.offset
        owner = 0 if trip.gathered else (here - step.offset) % trip.shards
        yield Visit(keys, where.key_at[owner], where.key_in[owner], jnp.asarray(step.pairs)[here], step.offset)


def _moved(tree: Any, axes: Axes, by: int) -> Any:
    """Every array sent ``by`` shards on."""
    size = _size(axes)
    if by % size == 0:
        return tree
    to = [(i, (i + by) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, to), tree)


class Running(NamedTuple):
    """The softmax so far, float32 [pieces, batch, kv_heads, group, piece, 1 or value_dim]."""

    top: jax.Array
    total: jax.Array
    mixed: jax.Array


class Pair(NamedTuple):
    """A piece of queries and one of keys: which, their scores as the products give them, and which are seen."""

    row: jax.Array
    column: jax.Array
    scores: jax.Array
    seen: jax.Array
    query_at: jax.Array
    key_at: jax.Array


def _pair(course: Course, query: jax.Array, visit: Visit, where: Where, number: jax.Array) -> Pair:
    row, column = jnp.divmod(jnp.maximum(number, 0), visit.keys.key.shape[0])
    scores = jnp.einsum("bkgqd,bkds->bkgqs", query[row], visit.keys.key[column], preferred_element_type=jnp.float32)
    places = (where.query_at[row], visit.key_at[column])
    visible = seen(course.scoring.mask, *places, where.query_in[row], visit.key_in[column]) & (number != NOBODY)
    return Pair(row, column, scores, visible[:, None, None], *places)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(course: Course, query: jax.Array, keys: Keys, learned: Learned, where: Where) -> Any:
    return _forward(course, query, keys, learned, where)[0]


def _forward(course: Course, query: jax.Array, keys: Keys, learned: Learned, where: Where) -> Any:
    state = _start(query, keys, learned)
    for visit in _visits(course, keys, where):
        state = _taken(course, query, visit, learned, where, state)
    # A row that has seen nothing (padding) gives 0.
    total = jnp.where(state.total > 0, state.total, 1)
    mixed = checkpoint_name((state.mixed / total).astype(keys.value.dtype), SAVED)
    normaliser = checkpoint_name(state.top + jnp.log(total), SAVED)
    return mixed, (query, keys, learned, where, mixed, normaliser)


def _start(query: jax.Array, keys: Keys, learned: Learned) -> Running:
    """Nothing seen, but the sinks."""
    rows = jnp.zeros((*query.shape[:-1], 1), jnp.float32)
    mixed = jnp.zeros((*query.shape[:-1], keys.value.shape[-1]), jnp.float32)
    if learned.sinks is None:
        return Running(rows + MASKED, rows, mixed)
    return Running(rows + by_head(learned.sinks, rows[0]), rows + 1, mixed)


def _taken(course: Course, query: jax.Array, visit: Visit, learned: Learned, where: Where, state: Running) -> Running:
    """The softmax after one step's pairs."""

    def body(state: Running, number: jax.Array) -> tuple[Running, None]:
        pair = _pair(course, query, visit, where, number)
        scores = course.scoring.changed(pair.scores, learned.table, pair.query_at, pair.key_at)
        top, total, mixed = (x[pair.row] for x in state)
        new = jnp.maximum(top, jnp.where(pair.seen, scores, MASKED).max(-1, keepdims=True))
        weights, kept = jnp.where(pair.seen, jnp.exp(scores - new), 0), jnp.exp(top - new)
        value = visit.keys.value[pair.column]
        added = jnp.einsum("bkgqs,bksd->bkgqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        news = Running(new, total * kept + weights.sum(-1, keepdims=True), mixed * kept + added)
        return Running(*(x.at[pair.row].set(y) for x, y in zip(state, news, strict=True))), None

    return jax.lax.scan(body, state, visit.pairs)[0]


class Gradients(NamedTuple):
    """Float32 sums of the gradients: of the queries, of the keys that are here, and of the bias's table."""

    query: jax.Array
    keys: Keys
    table: Any


def _backward(course: Course, residuals: Any, d_mixed: jax.Array) -> Any:
    query, keys, learned, where, mixed, normaliser = residuals
    delta = (d_mixed.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1, keepdims=True)
    table = jax.tree.map(lambda t: t.astype(jnp.float32), learned.table)
    d_query, d_table = jnp.zeros(query.shape, jnp.float32), jax.tree.map(jnp.zeros_like, table)
    d_keys, last = None, 0
    for visit in _visits(course, keys, where):
        like = Keys(*(jnp.zeros(s, jnp.float32) for s in (visit.keys.key.shape, visit.keys.value.swapaxes(3, 4).shape)))
        start = Gradients(d_query, like, d_table)
        d_query, own, d_table = _gradients(course, (query, visit, table, where), (d_mixed, delta, normaliser), start)
        # Added only now, so that what comes with the keys may come while this step computes.
        d_keys = own if d_keys is None else jax.tree.map(jnp.add, _moved(d_keys, course.axes, visit.offset - last), own)
        last = visit.offset
    d_keys = _home(course, cast(Keys, d_keys), last)
    d_learned = Learned(_sinks(learned.sinks, normaliser, delta), d_table)
    d_learned = jax.tree.map(lambda d, x: d.astype(x.dtype), d_learned, learned)
    d_keys = Keys(d_keys.key.astype(keys.key.dtype), d_keys.value.swapaxes(3, 4).astype(keys.value.dtype))
    return d_query.astype(query.dtype), d_keys, d_learned, None


def _gradients(course: Course, inputs: Any, backward: Any, start: Gradients) -> Gradients:
    """The gradients after one step's pairs, whose scores are computed again."""
    query, visit, table, where = inputs

    def body(sums: Gradients, number: jax.Array) -> tuple[Gradients, None]:
        pair = _pair(course, query, visit, where, number)
        change = functools.partial(course.scoring.changed, query_at=pair.query_at, key_at=pair.key_at)
        scores, back = jax.vjp(change, pair.scores, table)
        do, delta, normaliser = (x[pair.row] for x in backward)
        key, value = (x[pair.column] for x in visit.keys)
        p = jnp.where(pair.seen, jnp.exp(scores - normaliser), 0)
        dp = jnp.einsum("bkgqd,bksd->bkgqs", do, value, preferred_element_type=jnp.float32)
        ds, d_table = back(p * (dp - delta))
        ds = ds.astype(query.dtype)
        d_query = jnp.einsum("bkgqs,bkds->bkgqd", ds, key, preferred_element_type=jnp.float32)
        d_keys = Keys(over_queries(query[pair.row], ds), over_queries(do, p.astype(do.dtype)))
        d_keys = jax.tree.map(lambda x, d: x.at[pair.column].add(d), sums.keys, d_keys)
        sums = Gradients(sums.query.at[pair.row].add(d_query), d_keys, jax.tree.map(jnp.add, sums.table, d_table))
        return sums, None

    return jax.lax.scan(body, start, visit.pairs)[0]


def _home(course: Course, d_keys: Keys, offset: int) -> Keys:
    """The keys' gradients, summed, at the shards that hold the keys."""
    if not course.trip.gathered:
        return cast(Keys, _moved(d_keys, course.axes, -offset))
    scatter = functools.partial(jax.lax.psum_scatter, axis_name=course.axes, scatter_dimension=0, tiled=True)
    return Keys(*(scatter(x) for x in d_keys))


def _sinks(sinks: jax.Array | None, normaliser: jax.Array, delta: jax.Array) -> jax.Array | None:
    """The gradient of the sinks [heads], over all pieces."""
    return sinks_gradient(sinks, *(_whole(x, 3) for x in (normaliser, delta)))


_attend.defvjp(cast(Any, _forward), cast(Any, _backward))
