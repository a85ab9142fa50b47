"""Which queries meet which keys when, where a mesh splits a sequence: worked out before anything is compiled.

Each shard's length is cut into pieces. A mask that cannot reach from a piece of queries to a piece of keys leaves the
pair out, and a step of the ring that no pair needs is not taken: a sliding window of one shard needs one hop. Where a
shard's work depends on where it stands (causal masks), the order in which the shards hold the pieces decides how
much the busiest one has to do: the orders are tried, and the cheapest is taken.
"""

import functools
from dataclasses import dataclass

import numpy as np

from lmx.kernels.masks import Mask

PIECE_MAXIMUM = 1024
"""Places of a piece, at most: what bounds the memory of the scores."""
NOBODY = -1
"""Stands where a shard has no more pairs in a step."""


@dataclass(frozen=True)
class Trip:
    """What a plan depends on.

    Attributes:
      mask: what bounds the reach, or None where queries and keys are not the same places and all may meet.
      shards: of the length.
      query_pieces, key_pieces: of each shard.
      piece: places of a piece of queries.
      gathered: whether every shard has all keys at once, rather than those of one shard after the other.
    """

    mask: Mask | None
    shards: int
    query_pieces: int
    key_pieces: int
    piece: int
    gathered: bool


@dataclass(frozen=True)
class Step:
    """One step of the ring.

    Attributes:
      offset: shard i has the keys of shard i - offset, modulo the shards.
      pairs: int32 [shards, pairs]: of each shard, a piece of its queries times the pieces of keys that it has, plus a
        piece of those; NOBODY after its last.
    """

    offset: int
    pairs: np.ndarray


@dataclass(frozen=True)
class Plan:
    """The steps, and whether the shards hold their pieces in the zig-zag order (see :func:`orders`)."""

    zigzag: bool
    steps: tuple[Step, ...]

    @property
    def cost(self) -> int:
        """Pairs that the busiest shard goes through, step by step: what the slowest one makes all wait for."""
        return sum(step.pairs.shape[1] for step in self.steps)


def pieces_of(length: int) -> int:
    """How many pieces a shard of this length is cut into: two or more, so that the zig-zag can part them."""
    pieces = 1
    while length % (2 * pieces) == 0 and (pieces == 1 or length // pieces > PIECE_MAXIMUM):
        pieces *= 2
    return pieces


def orders(shards: int, pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """The row's pieces that each shard holds, int [shards, pieces]: in order, and in the zig-zag.

    There shard i holds the halves i and 2 * shards - 1 - i of all 2 * shards, so that under a causal mask each has as
    much to do. One piece cannot be parted: the zig-zag is then the order itself.
    """
    straight = np.arange(shards * pieces).reshape(shards, pieces)
    if pieces % 2:
        return straight, straight
    halves = np.arange(shards * pieces).reshape(2 * shards, pieces // 2)
    return straight, np.concatenate([halves[:shards], halves[: shards - 1 : -1]], axis=1)


@functools.lru_cache(maxsize=256)
def plan(trip: Trip) -> Plan:
    """The plan of the least cost; without the zig-zag, which moves the pieces, where it gains nothing."""
    reach = reached(trip)
    straight, zigzag = orders(trip.shards, trip.query_pieces)
    if trip.mask is None:
        return Plan(False, _steps(trip, reach, straight, orders(trip.shards, trip.key_pieces)[0]))
    # Gathered keys lie in order, whatever the queries do.
    found = [Plan(parted, _steps(trip, reach, o, o)) for parted, o in ((False, straight), (True, zigzag))]
    return min(found, key=lambda p: p.cost)


def reached(trip: Trip) -> np.ndarray:
    """bool [pieces of the row's queries, pieces of its keys]: what the mask can reach from where."""
    queries, keys = trip.shards * trip.query_pieces, trip.shards * trip.key_pieces
    if trip.mask is None:
        return np.ones((queries, keys), bool)
    ends = (np.arange(queries) + 1) * trip.piece
    spans = [trip.mask.reach(end - trip.piece, end, trip.piece * queries) for end in ends.tolist()]
    return np.array([(ends > first) & (ends - trip.piece < last) for first, last in spans])


def _steps(trip: Trip, reach: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> tuple[Step, ...]:
    if trip.gathered:
        return (Step(0, _table([reach[own] for own in queries])),)
    shards = range(trip.shards)
    tables = [(s, _table([reach[np.ix_(queries[i], keys[i - s])] for i in shards])) for s in shards]
    return tuple(Step(offset, table) for offset, table in tables if table.shape[1])


def _table(met: list[np.ndarray]) -> np.ndarray:
    """Of each shard, the pairs that meet in its bool [pieces of queries, pieces of keys]."""
    pairs = [np.flatnonzero(m) for m in met]
    table = np.full((len(met), max(map(len, pairs))), NOBODY, np.int32)
    for row, own in zip(table, pairs, strict=True):
        row[: len(own)] = own
    return table
