"""Self-attention: multi-head, grouped-query and multi-query, with or without a cache."""

import functools
from dataclasses import dataclass, field

import jax
from flax import nnx

from lmx.kernels.attention import attention
from lmx.kernels.masks import Causal, Mask
from lmx.nn.context import Context, SublayerOutput
from lmx.nn.linear import Linear
from lmx.nn.module import Part, dropout
from lmx.nn.position import Rope
from lmx.nn.sublayer import Sublayer
from lmx.sharding.rules import constrain

HEADS = ("act_batch", "act_length", "act_heads", None)
KEYS = ("act_batch", "act_kv_heads", None, "act_length")
VALUES = ("act_batch", "act_kv_heads", "act_length", None)


@dataclass(frozen=True)
class SelfAttention(Sublayer):
    """Queries of ``heads`` heads over keys and values of ``kv_heads`` (equal: MHA; fewer: GQA; one: MQA)."""

    heads: int = 12
    kv_heads: int = 12
    head_dim: int = 64
    mask: Mask = field(default_factory=Causal)
    rope: Rope | None = None
    bias: bool = False
    """Biases on the query, key, value and output maps."""
    attention_dropout: float = 0.0
    """Dropout on the attention probabilities."""

    @property
    def name(self) -> str:
        """The sublayer's key in the parameters."""
        return "attention"

    def inner(self, width: int) -> Part:
        """The attention module for inputs [batch, length, width]."""
        return Part(functools.partial(SelfAttentionModule, self, width))

    def cache_streams(self, batch: int, slots: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the key and value streams."""
        heads = (batch, self.kv_heads)
        return {"key": (*heads, self.head_dim, slots), "value": (*heads, slots, self.head_dim)}


class SelfAttentionModule(nnx.Module):
    """[batch, length, embed] -> [batch, length, embed]."""

    def __init__(self, spec: SelfAttention, width: int, rngs: nnx.Rngs):
        self.spec = spec
        linear = functools.partial(Linear, bias=spec.bias, rngs=rngs)
        queries, keys = (spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim)
        self.query = linear((width,), queries, ("embed", "heads", "head_dim"), std=spec.std)
        self.key = linear((width,), keys, ("embed", "kv_heads", "head_dim"), std=spec.std)
        self.value = linear((width,), keys, ("embed", "kv_heads", "head_dim"), std=spec.std)
        self.out = linear(queries, (width,), ("heads", "head_dim", "embed"), std=spec.out_std)

    def __call__(self, x: jax.Array, context: Context) -> SublayerOutput:
        spec = self.spec
        query = constrain(self.query(x), HEADS)
        key, value = self.key(x), self.value(x)
        if spec.rope is not None:
            query = spec.rope.rotate(query, context.positions)
            key = spec.rope.rotate(key, context.positions)
        key, value = constrain(key.transpose(0, 2, 3, 1), KEYS), constrain(value.swapaxes(1, 2), VALUES)
        cache, key_positions, key_segments = None, context.positions, context.segments
        if context.cache is not None:
            cache = context.cache.write("key", key, axis=3).write("value", value, axis=2)
            key, value = cache.streams["key"].astype(x.dtype), cache.streams["value"].astype(x.dtype)
            key_positions, key_segments = cache.view.positions, cache.view.segments
        mixed = attention(
            query,
            key,
            value,
            mask=spec.mask,
            query_positions=context.positions,
            key_positions=key_positions,
            query_segments=context.segments,
            key_segments=key_segments,
            itself=cache is None,
            dropout=spec.attention_dropout,
            dropout_key=context.fold(1).key,
        )
        return SublayerOutput(dropout(self.out(constrain(mixed, HEADS)), spec.dropout, context.fold(0).key), cache)
