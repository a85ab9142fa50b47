"""Multi-head latent attention (DeepSeek-V2, 2.1; DeepSeek-V3, 2.1.1)."""

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from lmx.kernels.attention import attention
from lmx.kernels.masks import Causal, Mask
from lmx.nn.attention import CACHED_HEADS, HEADS, KEYS, VALUES, returned, with_prefix
from lmx.nn.cache import LayerCache
from lmx.nn.context import Context, SublayerOutput
from lmx.nn.kernel import densed
from lmx.nn.linear import Linear
from lmx.nn.module import Declarations, Part, dropout
from lmx.nn.norm import Norm, RmsNorm
from lmx.nn.position import Rope
from lmx.nn.sublayer import Attending, Scores
from lmx.sharding.rules import constrain, exchange

CACHED_LATENT = ("act_cache_batch", None, "act_cache_length")


@dataclass(frozen=True)
class LatentAttention(Attending):
    """Keys and values of all heads come from one small latent, the only thing cached beside one rotated key.

    A query and a key have ``nope_dim`` dimensions without position and ``rope_dim`` with it; the rotated key is one
    for all heads.
    """

    heads: int = 128
    q_lora: int | None = 1536
    """Width of the queries' latent; None makes queries straight from the input."""
    kv_lora: int = 512
    """Width of the latent of keys and values."""
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    mask: Mask = field(default_factory=Causal)
    rope: Rope = field(default_factory=Rope)
    scale: float | None = None
    """Multiplies the scores; 1 / sqrt(nope_dim + rope_dim) by default."""
    latent_norm: Norm = field(default_factory=RmsNorm)
    bias: bool = False
    """Biases on the maps from the input to the latents, and on the output map."""

    @property
    def name(self) -> str:
        """The sublayer's key in the parameters."""
        return "attention"

    @property
    def head_dim(self) -> int:
        """Width of a query and of a key."""
        return self.nope_dim + self.rope_dim

    def inner(self, width: int) -> Part:
        """The attention module for inputs [batch, length, width]."""
        return Part(functools.partial(LatentAttentionModule, self, width))

    def cache_streams(self, batch: int, slots: int, memory: int = 0) -> dict[str, tuple[int, ...]]:
        """The shape of the one stream: the latent, and below it the rotated key."""
        return {"latent": (batch, self.kv_lora + self.rope_dim, slots)}

    @property
    def scores(self) -> Scores:
        """Every head with its expanded key and value, as in training and in reading a prompt."""
        return Scores(self.heads * (self.head_dim + self.value_dim), self.mask)


class LatentAttentionModule(nnx.Module):
    """[batch, length, embed] -> [batch, length, embed]."""

    def __init__(self, spec: LatentAttention, width: int, declared: Declarations):
        self.spec = spec
        linear = functools.partial(Linear, std=spec.std, declared=declared)
        queries, up = (spec.heads, spec.head_dim), (spec.heads, spec.nope_dim + spec.value_dim)
        if spec.q_lora is None:
            self.query = linear((width,), queries, ("embed", "heads", "head_dim"))
        else:
            self.query_down = linear((width,), (spec.q_lora,), ("embed", "q_lora"), bias=spec.bias)
            self.query_norm = spec.latent_norm.part(spec.q_lora).build(declared)
            self.query_up = linear((spec.q_lora,), queries, ("q_lora", "heads", "head_dim"))
        self.latent = linear((width,), (spec.kv_lora,), ("embed", "kv_lora"), bias=spec.bias)
        self.rope_key = linear((width,), (spec.rope_dim,), ("embed", "head_dim"), bias=spec.bias)
        self.latent_norm = spec.latent_norm.part(spec.kv_lora).build(declared)
        self.latent_up = linear((spec.kv_lora,), up, ("kv_lora", "heads", "head_dim"))
        values = (spec.heads, spec.value_dim)
        self.out = Linear(
            values, (width,), ("heads", "head_dim", "embed"), std=spec.out_std, bias=spec.bias, declared=declared
        )

    def __call__(self, x: jax.Array, context: Context) -> SublayerOutput:
        spec = self.spec
        nope, turned = jnp.split(constrain(self._query(x), HEADS), [spec.nope_dim], axis=-1)
        turned = spec.rope.rotate(turned, context.positions, context.reach)
        latent = self.latent_norm(self.latent(x))
        rope_key = spec.rope.rotate(self.rope_key(x)[:, :, None], context.positions, context.reach)
        if context.cache is None:
            mixed, cache = self._expanded(nope, turned, latent, rope_key, context), None
        else:
            mixed, cache = self._absorbed(nope, turned, latent, rope_key, context)
        return SublayerOutput(dropout(self.out(constrain(mixed, HEADS)), spec.dropout, context.fold(0).key), cache)

    def _query(self, x: jax.Array) -> jax.Array:
        if self.spec.q_lora is None:
            return self.query(x)
        return self.query_up(self.query_norm(self.query_down(x)))

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, context: Context, cache: LayerCache | None
    ) -> jax.Array:
        spec, seen = self.spec, context if cache is None else cache.view
        mask, positions = with_prefix(spec.mask, context)
        return attention(
            query,
            key,
            value,
            mask=mask,
            query_positions=positions,
            key_positions=positions if cache is None else seen.positions,
            query_segments=context.segments,
            key_segments=seen.segments,
            itself=cache is None,
            scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
            dropout=spec.attention_dropout,
            dropout_key=context.fold(1).key,
        )

    def _expanded(
        self, nope: jax.Array, turned: jax.Array, latent: jax.Array, rope_key: jax.Array, context: Context
    ) -> jax.Array:
        """Every head's keys and values in full: the fewest operations where all of them are new."""
        spec = self.spec
        key, value = jnp.split(self.latent_up(latent), [spec.nope_dim], axis=-1)
        rope_key = jnp.broadcast_to(rope_key, (*key.shape[:3], spec.rope_dim))
        key = jnp.concatenate([key, rope_key], axis=-1).transpose(0, 2, 3, 1)
        query = jnp.concatenate([nope, turned], axis=-1)
        return self._attend(query, constrain(key, KEYS), constrain(value.swapaxes(1, 2), VALUES), context, None)

    def _absorbed(
        self, nope: jax.Array, turned: jax.Array, latent: jax.Array, rope_key: jax.Array, context: Context
    ) -> tuple[jax.Array, LayerCache]:
        """Queries taken into the latent's space, where the cache is one key head and its own value."""
        spec = self.spec
        assert context.cache is not None
        new = jnp.concatenate([latent, rope_key[:, :, 0]], axis=-1).swapaxes(1, 2)
        cache = context.cache.write("latent", new, CACHED_LATENT)
        key = cache.streams["latent"].astype(latent.dtype)
        value = key[:, : spec.kv_lora].swapaxes(1, 2)
        up_key, up_value = jnp.split(densed(self.latent_up.kernel[...], latent.dtype), [spec.nope_dim], axis=-1)
        query = jnp.concatenate([jnp.einsum("blhn,chn->blhc", nope, up_key), turned], axis=-1)
        mixed = returned(self._attend(exchange(query, HEADS, CACHED_HEADS), key, value, context, cache))
        return jnp.einsum("blhc,chv->blhv", mixed, up_value), cache
