"""Attention of a decoder to its encoder (Vaswani et al. 2017, 3.2.3)."""

import functools
from dataclasses import dataclass

import jax

from lmx.kernels.attention import attention
from lmx.kernels.masks import Bidirectional
from lmx.nn.attention import (
    CACHED_HEADS,
    CACHED_KEYS,
    CACHED_VALUES,
    HEADS,
    KEYS,
    VALUES,
    MultiHead,
    MultiHeadModule,
    returned,
)
from lmx.nn.cache import LayerCache
from lmx.nn.context import Context, SublayerOutput
from lmx.nn.module import Declarations, Part, dropout
from lmx.nn.sublayer import Scores
from lmx.sharding.rules import constrain, exchange


@dataclass(frozen=True)
class CrossAttention(MultiHead):
    """Queries of the decoder over keys and values of ``context.memory``; a cache keeps those, written once."""

    @property
    def name(self) -> str:
        """The sublayer's key in the parameters."""
        return "cross_attention"

    def inner(self, width: int) -> Part:
        """The module for inputs [batch, length, width]."""
        return Part(functools.partial(CrossAttentionModule, self, width))

    def cache_streams(self, batch: int, slots: int, memory: int = 0) -> dict[str, tuple[int, ...]]:
        """The shapes of the encoder's keys and values."""
        heads = (batch, self.kv_heads)
        return {"key": (*heads, self.head_dim, memory), "value": (*heads, memory, self.head_dim)}

    @property
    def scores(self) -> Scores:
        """Every query head with a key and a value of ``head_dim``, over all of the encoder's positions."""
        return Scores(2 * self.heads * self.head_dim, Bidirectional(), memory=True)


class CrossAttentionModule(MultiHeadModule):
    """[batch, length, embed] -> [batch, length, embed]."""

    def __init__(self, spec: CrossAttention, width: int, declared: Declarations):
        super().__init__(spec, width, declared)
        self.spec = spec

    def __call__(self, x: jax.Array, context: Context) -> SublayerOutput:
        spec = self.spec
        seen, query = self._remembered(context, x), constrain(self.query(x), HEADS)
        mixed = attention(
            query if context.cache is None else exchange(query, HEADS, CACHED_HEADS),
            seen.streams["key"].astype(x.dtype),
            seen.streams["value"].astype(x.dtype),
            mask=Bidirectional(),
            query_positions=context.positions,
            key_positions=seen.view.memory_positions,
            query_segments=context.segments,
            key_segments=seen.view.memory_segments,
            scale=spec.scale,
            dropout=spec.attention_dropout,
            dropout_key=context.fold(1).key,
        )
        mixed = constrain(mixed, HEADS) if context.cache is None else returned(mixed)
        out = dropout(self.out(mixed), spec.dropout, context.fold(0).key)
        return SublayerOutput(out, seen if context.cache is not None else None)

    def _remembered(self, context: Context, x: jax.Array) -> LayerCache:
        """The encoder's keys and values: of the memory where it is given, else of the cache."""
        if context.memory is None:
            assert context.cache is not None, "cross-attention has neither a memory nor a cache"
            return context.cache
        key, value = self.key(context.memory.hidden), self.value(context.memory.hidden)
        streams = {
            "key": constrain(key.transpose(0, 2, 3, 1), KEYS),
            "value": constrain(value.swapaxes(1, 2), VALUES),
        }
        if context.cache is None:
            return LayerCache(streams, context.memory.view)
        return context.cache.put("key", streams["key"], CACHED_KEYS).put("value", streams["value"], CACHED_VALUES)
