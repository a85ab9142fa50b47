"""Token embeddings, and what models add to them: positions, token types, a norm."""

import abc
import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lmx.nn.context import Context
from lmx.nn.module import Declarations, Part, dropout, parameter
from lmx.nn.noise import TokenNoise
from lmx.nn.norm import Norm, build_norm
from lmx.sharding.rules import constrain


@dataclass(frozen=True)
class Positions(abc.ABC):
    """Base class of the positions that are added to embeddings."""

    @property
    def rows(self) -> int:
        """Rows of the learned table; 0 for none."""
        return 0

    @abc.abstractmethod
    def vectors(self, positions: jax.Array, width: int, table: jax.Array | None) -> jax.Array:
        """int32 positions [batch, length] -> [batch, length, width]."""


@dataclass(frozen=True)
class Learned(Positions):
    """A learned row for each of ``context`` positions, after ``offset`` rows that no position uses (BART: 2)."""

    context: int
    offset: int = 0

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.context + self.offset

    def vectors(self, positions: jax.Array, width: int, table: jax.Array | None) -> jax.Array:
        """Rows of the table."""
        assert table is not None
        return table[positions + self.offset]


@dataclass(frozen=True)
class Sinusoidal(Positions):
    """Sines and cosines of wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al. 2017, 3.5).

    The paper has them ``interleaved``; Marian has the sines in the first half and the cosines in the second.
    """

    layout: Literal["interleaved", "halves"] = "interleaved"

    def vectors(self, positions: jax.Array, width: int, table: jax.Array | None) -> jax.Array:
        """sin(p / 10000^(2i / width)) and the cosine of the same, for i below width / 2."""
        frequencies = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        waves = [jnp.sin(angles), jnp.cos(angles)]
        if self.layout == "halves":
            return jnp.concatenate(waves, axis=-1)
        return jnp.stack(waves, axis=-1).reshape(*positions.shape, width)


@dataclass(frozen=True)
class Embedding:
    """``dropout(norm(scale * table[tokens] + positions + types))``."""

    vocab: int
    """Rows, padding included; 0 takes the table of the other stack."""
    positions: Positions | None = None
    types: int = 0
    """Token types (BERT: the two sentences); 0 for none."""
    norm: Norm | None = None
    scale: float = 1.0
    dropout: float = 0.0
    std: float = 0.02
    noise: TokenNoise | None = None
    """Hides tokens in training."""

    def part(self, width: int) -> Part:
        """The module: int32 tokens [batch, length] -> [batch, length, width]."""
        return Part(functools.partial(EmbeddingModule, self, width))


class EmbeddingModule(nnx.Module):
    """int32 [batch, length] -> [batch, length, embed]; ``table`` is the other stack's where this has none."""

    def __init__(self, spec: Embedding, width: int, declared: Declarations):
        self.spec, self.width = spec, width
        init = nnx.initializers.normal(spec.std)
        rows = 0 if spec.positions is None else spec.positions.rows
        self.table = parameter(declared, (spec.vocab, width), ("vocab", "embed"), init) if spec.vocab else None
        self.position = parameter(declared, (rows, width), ("position", "embed"), init) if rows else None
        self.type = parameter(declared, (spec.types, width), (None, "embed"), init) if spec.types else None
        self.norm = build_norm(spec.norm, width, declared)

    def __call__(self, tokens: jax.Array, context: Context, table: jax.Array | None = None) -> jax.Array:
        spec = self.spec
        given = table if self.table is None else self.table
        assert given is not None
        own = given[...]
        tokens = tokens if spec.noise is None else spec.noise.tokens(tokens, context.key)
        own = constrain(own, ("vocab", "embed"))  # to be gathered after its cast to a narrower dtype, not before
        x = constrain(constrain(own, ("act_vocab", "act_embed"))[tokens], ("act_batch", "act_length", "act_embed"))
        x = x if spec.noise is None else spec.noise.embeddings(x, context.key)
        if spec.scale != 1:
            x = x * jnp.asarray(spec.scale, x.dtype)
        if spec.positions is not None:
            rows = None if self.position is None else constrain(self.position[...], ("position", "act_embed"))
            x = x + spec.positions.vectors(context.positions, self.width, rows).astype(x.dtype)
        if self.type is not None:
            types = jnp.zeros_like(tokens) if context.types is None else context.types
            x = x + self.type[...].astype(x.dtype)[types]
        return dropout(x if self.norm is None else self.norm(x), spec.dropout, context.key)
