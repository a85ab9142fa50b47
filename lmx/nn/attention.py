"""Self-attention: multi-head, grouped-query and multi-query, with or without a cache."""

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from flax import nnx

from lmx.errors import UserError
from lmx.kernels.attention import attention
from lmx.kernels.masks import Causal, Mask, Prefix, in_prefix
from lmx.kernels.relative import RelativeBuckets
from lmx.nn.cache import cached_heads
from lmx.nn.context import Context, SublayerOutput
from lmx.nn.linear import Linear
from lmx.nn.module import Declarations, Part, dropout, parameter
from lmx.nn.norm import Norm, build_norm
from lmx.nn.position import Rope
from lmx.nn.sublayer import Attending, Scores
from lmx.sharding.rules import constrain, exchange

HEADS = ("act_batch", "act_length", "act_heads", None)
KEY_HEADS = ("act_batch", "act_length", "act_kv_heads", None)
KEYS = ("act_batch", "act_kv_heads", None, "act_length")
VALUES = ("act_batch", "act_kv_heads", "act_length", None)
CACHED_HEADS = ("act_cache_batch", None, "act_cache_heads", None)
"""Of queries on a cache, and of what they gather: a layout may split attention by the batch there (Pope et al. 2022,
3.3), and nothing else."""
CACHED_KEYS = ("act_cache_batch", "act_cache_kv_heads", None, "act_cache_length")
CACHED_VALUES = ("act_cache_batch", "act_cache_kv_heads", "act_cache_length", None)


@dataclass(frozen=True)
class MultiHead(Attending):
    """Base class: ``heads`` of queries over ``kv_heads`` of keys and values (equal: MHA; fewer: GQA; one: MQA)."""

    heads: int = 12
    kv_heads: int = 12
    head_dim: int = 64
    bias: bool = False
    """Biases on the query, key and value maps."""
    out_bias: bool = False
    """A bias on the output map."""
    scale: float | None = None
    """Multiplies the scores; 1 / sqrt(head_dim) by default."""


class MultiHeadModule(nnx.Module):
    """Holds the maps ``query``, ``key``, ``value`` and ``out``."""

    def __init__(self, spec: MultiHead, width: int, declared: Declarations):
        linear = functools.partial(Linear, declared=declared)
        queries, keys = (spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim)
        self.query = linear((width,), queries, ("embed", "heads", "head_dim"), std=spec.std, bias=spec.bias)
        self.key = linear((width,), keys, ("embed", "kv_heads", "head_dim"), std=spec.std, bias=spec.bias)
        self.value = linear((width,), keys, ("embed", "kv_heads", "head_dim"), std=spec.std, bias=spec.bias)
        self.out = linear(queries, (width,), ("heads", "head_dim", "embed"), std=spec.out_std, bias=spec.out_bias)


@dataclass(frozen=True)
class SelfAttention(MultiHead):
    """Each position over those of its own sequence that ``mask`` shows."""

    mask: Mask = field(default_factory=Causal)
    rope: Rope | None = None
    qk_norm: Norm | None = None
    """A norm on queries and one on keys, before they are rotated (Dehghani et al. 2023)."""
    qk_norm_over: Literal["head", "heads"] = "head"
    """Whether that norm takes each head by itself, or all heads together (OLMo-2)."""
    softcap: float | None = None
    """Bounds the scores smoothly (Gemma 2)."""
    sinks: bool = False
    """A learned logit for each head that takes probability and gives nothing (Xiao et al. 2023; GPT-OSS)."""
    relative: RelativeBuckets | None = None
    """A bias by relative position; its table is the stack's shared ``relative`` (T5)."""

    @property
    def name(self) -> str:
        """The sublayer's key in the parameters."""
        return "attention"

    def inner(self, width: int) -> Part:
        """The attention module for inputs [batch, length, width]."""
        return Part(functools.partial(SelfAttentionModule, self, width))

    def cache_streams(self, batch: int, slots: int, memory: int = 0) -> dict[str, tuple[int, ...]]:
        """The shapes of the key and value streams: one row for each key head of each sequence."""
        rows = cached_heads(batch, self.kv_heads)
        return {"key": (*rows, self.head_dim, slots), "value": (*rows, slots, self.head_dim)}

    @property
    def scores(self) -> Scores:
        """Every query head with a key and a value of ``head_dim``."""
        return Scores(2 * self.heads * self.head_dim, self.mask)


class SelfAttentionModule(MultiHeadModule):
    """[batch, length, embed] -> [batch, length, embed]."""

    def __init__(self, spec: SelfAttention, width: int, declared: Declarations):
        super().__init__(spec, width, declared)
        self.spec = spec
        self.query_norm, self.key_norm = (self._norm(heads, declared) for heads in (spec.heads, spec.kv_heads))
        self.sinks = parameter(declared, (spec.heads,), ("heads",), nnx.initializers.zeros) if spec.sinks else None

    def _norm(self, heads: int, declared: Declarations) -> Any:
        across = heads if self.spec.qk_norm_over == "heads" else 1
        return build_norm(self.spec.qk_norm, across * self.spec.head_dim, declared)

    def __call__(self, x: jax.Array, context: Context) -> SublayerOutput:
        spec = self.spec
        query = self._placed(constrain(self.query(x), HEADS), self.query_norm, context)
        key = self._placed(constrain(self.key(x), KEY_HEADS), self.key_norm, context).transpose(0, 2, 3, 1)
        value = constrain(self.value(x), KEY_HEADS).swapaxes(1, 2)
        cache, key_positions, key_segments = None, context.positions, context.segments
        if context.cache is None:
            key, value = constrain(key, KEYS), constrain(value, VALUES)
        else:
            query = exchange(query, HEADS, CACHED_HEADS)
            cache = context.cache.write("key", key, CACHED_KEYS).write("value", value, CACHED_VALUES)
            key, value = cache.streams["key"].astype(x.dtype), cache.streams["value"].astype(x.dtype)
            key_positions, key_segments = cache.view.positions, cache.view.segments
        mask, query_positions = with_prefix(spec.mask, context)
        key_positions = query_positions if cache is None else key_positions
        mixed = attention(
            query,
            key,
            value,
            mask=mask,
            query_positions=query_positions,
            key_positions=key_positions,
            query_segments=context.segments,
            key_segments=key_segments,
            itself=cache is None,
            scale=spec.scale,
            softcap=spec.softcap,
            sinks=None if self.sinks is None else self.sinks[...],
            bias=spec.relative,
            bias_table=context.shared["relative"]["table"] if spec.relative else None,
            dropout=spec.attention_dropout,
            dropout_key=context.fold(1).key,
        )
        mixed = constrain(mixed, HEADS) if cache is None else returned(mixed)
        return SublayerOutput(dropout(self.out(mixed), spec.dropout, context.fold(0).key), cache)

    def _placed(self, x: jax.Array, norm: Any, context: Context) -> jax.Array:
        """Queries or keys [batch, length, heads, head_dim], normalised and rotated."""
        if norm is not None:
            flat = x.reshape(*x.shape[:2], -1) if self.spec.qk_norm_over == "heads" else x
            x = norm(flat).reshape(x.shape)
        rope = self.spec.rope
        return x if rope is None else rope.rotate(x, context.positions, context.reach)


def returned(mixed: jax.Array) -> jax.Array:
    """What queries on a cache gathered [batch, length, heads, head_dim], laid out as the other heads are."""
    return exchange(constrain(mixed, CACHED_HEADS), CACHED_HEADS, HEADS, back=True)


def with_prefix(mask: Mask, context: Context) -> tuple[Mask, jax.Array]:
    """The mask and the positions int32 [batch, length] to give it, where the context may have a prefix.

    Raises:
      UserError: there is a prefix, and the mask has no form that sees it.
    """
    if context.prefix is None:
        return mask, context.positions
    if mask != Causal():
        raise UserError(f"a prefix needs layers that see all before them, but one has {mask}; use another objective")
    return Prefix(), in_prefix(context.positions, context.prefix)
