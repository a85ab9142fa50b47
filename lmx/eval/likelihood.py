"""Log-probabilities of chosen tokens in many rows: grouped by length, in a few compiled shapes."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from lmx.decode import rows as decoding
from lmx.decode.loaded import Model
from lmx.models import model as models
from lmx.models.model import Inputs, cast_floats
from lmx.models.specs import ModelSpec
from lmx.nn.module import Params
from lmx.sharding.rules import Sharding, use_sharding

SHORTEST = 32
"""Rows are padded to this or a power of two times it, by their own length: a row's numbers do not depend on the others
that are in its batch."""
FEW = 16
"""Rows that are asked for at most so many tokens have room for so many; others for as many as they have tokens."""
CHUNK = 128
"""Positions of a batch whose logits are held at once."""


@dataclass(frozen=True)
class Read:
    """One row, and what is asked of it.

    Attributes:
      tokens: what the model reads (of an encoder-decoder, its decoder).
      at: positions in the row whose predictions are asked for.
      targets: for each of them, the token whose log-probability is wanted.
      source: what the encoder of an encoder-decoder reads.
      prefix: how many tokens at the front see all of each other, in a decoder that learned so.
    """

    tokens: tuple[int, ...]
    at: tuple[int, ...]
    targets: tuple[int, ...]
    source: tuple[int, ...] = ()
    prefix: int = 0

    @property
    def read(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """What the model reads, apart from what is asked of it."""
        return self.tokens, self.source, self.prefix


class Scores(NamedTuple):
    """For each target of a row, its natural log-probability (float32 [targets]), and whether it is the arg-max."""

    logprobs: np.ndarray
    best: np.ndarray


@dataclass(frozen=True)
class Scorer:
    """Reads rows with a loaded model, ``batch`` at a time, on the mesh that the model lies on."""

    model: Model
    batch: int = 8

    @functools.cached_property
    def params(self) -> Params:
        """The parameters in the dtype to compute in."""
        dtype = self.model.compute or self.model.params["embedding"]["table"].dtype
        return cast(Params, cast_floats(self.model.params, dtype))

    def read(self, rows: Sequence[Read]) -> list[Scores]:
        """The scores of each row; rows that read the same tokens are run once."""
        merged: dict[Any, dict[tuple[int, int], int]] = {}
        places = []
        for row in rows:
            asked = merged.setdefault(row.read, {})
            wanted = zip(row.at, row.targets, strict=True)
            places.append([asked.setdefault(pair, len(asked)) for pair in wanted])
        unique = [
            Read(tokens, tuple(at for at, _ in asked), tuple(t for _, t in asked), source, prefix)
            for (tokens, source, prefix), asked in merged.items()
        ]
        found = dict(zip(merged, self._read(unique), strict=True))
        scores = (found[row.read] for row in rows)
        return [Scores(s.logprobs[where], s.best[where]) for s, where in zip(scores, places, strict=True)]

    def _read(self, rows: Sequence[Read]) -> list[Scores]:
        """Rows that are all different."""
        scores: list[Any] = [None] * len(rows)
        spec, sharding = self.model.spec, self.model.sharding
        for shape, group in batches([self._shape(row) for row in rows], self.rows):
            length, asked, source = shape
            chosen = [rows[i] for i in group]
            own = padded([row.tokens for row in chosen], length, [row.prefix for row in chosen])
            inputs = on_mesh(own, sharding)
            encoder = on_mesh(padded([row.source for row in chosen], source), sharding) if source else None
            at, targets = (cast(Any, filled([getattr(r, n) for r in chosen], asked)) for n in ("at", "targets"))
            if sharding is not None:
                at, targets = (sharding.put(a, ("act_batch", None)) for a in (at, targets))
            found = _scores(spec, sharding, self.params, inputs, encoder, at, targets)
            logprobs, best = (readable(a, sharding) for a in found)
            for i, row, p, b in zip(group, chosen, logprobs, best, strict=True):
                scores[i] = Scores(p[: len(row.at)], b[: len(row.at)])
        return cast(list[Scores], scores)

    @property
    def rows(self) -> int:
        """Rows of a batch: as many as asked for, or the next number that the mesh divides."""
        sharding = self.model.sharding
        ways = 1 if sharding is None else sharding.ways("act_batch")
        return -(-self.batch // ways) * ways

    def _shape(self, row: Read) -> tuple[int, int, int]:
        limit = self.model.spec.context
        length = bucket(len(row.tokens), limit)
        asked = FEW if len(row.at) <= FEW else bucket(len(row.at), len(row.at))
        return length, asked, bucket(len(row.source), limit) if row.source else 0


def bucket(length: int, limit: int) -> int:
    """The length that a row is padded to: a power of two times SHORTEST, at most ``limit`` (or its own length)."""
    size = SHORTEST
    while size < length:
        size *= 2
    return max(length, min(size, limit))


def batches(shapes: Sequence[Any], batch: int) -> Iterator[tuple[Any, list[int]]]:
    """The numbers of the rows in batches of one shape each, the last of a shape filled up with its last row."""
    for shape in sorted(set(shapes)):
        group = [i for i, own in enumerate(shapes) if own == shape]
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            yield shape, part + part[-1:] * (batch - len(part))


def padded(rows: Sequence[Sequence[int]], length: int, prefixes: Sequence[int] = ()) -> Inputs:
    """Rows as int32 [batch, length], padded on the right with segment 0; on the host, so that any mesh takes them.

    The first ``prefixes[i]`` tokens of row i see all of each other; without any, no token sees a later one.
    """
    tokens = filled(rows, length)
    segments = filled([[1] * len(row) for row in rows], length)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    prefix = positions < np.array(prefixes)[:, None] if any(prefixes) else None
    return Inputs(*(cast(jax.Array, a) for a in (tokens, positions * segments, segments, None, prefix)))


def filled(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Rows of numbers as int32 [batch, length], zeros behind each."""
    array = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return array


def on_mesh(inputs: Inputs, sharding: Sharding | None) -> Inputs:
    """Rows of the host where the model reads them; a mesh that splits the length may pad them further."""
    return decoding.divisible(inputs, sharding)


def readable(array: jax.Array, sharding: Sharding | None) -> np.ndarray:
    """What a program gave, on the host of every process."""
    return np.asarray(array if sharding is None else sharding.whole(array))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(
    spec: ModelSpec,
    sharding: Sharding | None,
    params: Params,
    inputs: Inputs,
    source: Inputs | None,
    at: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Float32 log-probabilities and bool [batch, asked]: whether a target is the arg-max."""
    with use_sharding(sharding):
        memory = None if source is None else models.encode(spec, params, source)[0]
        hidden = models.apply(spec, params, inputs, memory=memory).hidden
        asked, size = at.shape[1], min(CHUNK, at.shape[1])
        more = ((0, 0), (0, -asked % size))
        at, targets = jnp.pad(at, more), jnp.pad(targets, more)
        picked = jnp.take_along_axis(hidden, at[..., None], axis=1)
        chunks = (_chunked(picked, size), _chunked(targets, size))
        found = jax.lax.map(lambda pair: _chunk_scores(spec, params, *pair), chunks)
        logprobs, best = (jnp.moveaxis(a, 0, 1).reshape(at.shape)[:, :asked] for a in found)
        return logprobs, best


def _chunk_scores(
    spec: ModelSpec, params: Params, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    scores = models.logits(spec, params, hidden)
    wanted = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return wanted - jax.nn.logsumexp(scores, axis=-1), scores.argmax(-1) == targets


def _chunked(a: jax.Array, size: int) -> jax.Array:
    """[batch, chunks * size, ...] -> [chunks, batch, size, ...]."""
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)
