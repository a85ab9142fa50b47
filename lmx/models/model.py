"""The functional Transformer: pure functions of a spec and plain parameter dicts."""

import functools
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from lmx.kernels.attention import MASKED
from lmx.models.block import RESIDUAL
from lmx.models.specs import ModelSpec, Remat
from lmx.models.stack import init_stack, scan_stack, stack_axes, unrolled_stack, unstack
from lmx.nn.cache import Cache, empty_view
from lmx.nn.context import Context
from lmx.nn.module import Params
from lmx.sharding.rules import constrain

LOGITS = ("act_batch", "act_length", "act_vocab")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "positions", "segments"], meta_fields=[])
@dataclass(frozen=True)
class Inputs:
    """What a model reads, int32 [batch, length] each: tokens, their positions, and segment ids (0 is padding)."""

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array

    @classmethod
    def whole(cls, tokens: jax.Array) -> "Inputs":
        """Tokens [batch, length] that are one document a row, without padding."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return cls(tokens, positions, jnp.ones_like(tokens))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hidden", "cache"], meta_fields=[])
@dataclass(frozen=True)
class Output:
    """Hidden states [batch, length, embed] after the final norm, and the cache if one was given."""

    hidden: jax.Array
    cache: Cache | None = None


def init_params(spec: ModelSpec, key: jax.Array) -> Params:
    """Fresh float32 parameters: ``embedding``, ``stack`` (leaves start with ``layers``), ``final_norm``, ``head``."""
    embedding, stack, head = jax.random.split(key, 3)
    params = {
        "embedding": spec.embedding.part(spec.width).init(embedding),
        "stack": init_stack(spec.stack, spec.width, stack),
        "final_norm": spec.final_norm.part(spec.width).init(key),
    }
    return params if spec.head is None else {**params, "head": spec.head.part(spec.width).init(head)}


def param_axes(spec: ModelSpec) -> Params:
    """The logical axes of every parameter, a tree parallel to :func:`init_params`'s."""
    axes = {
        "embedding": spec.embedding.part(spec.width).axes(),
        "stack": stack_axes(spec.stack, spec.width),
        "final_norm": spec.final_norm.part(spec.width).axes(),
    }
    return axes if spec.head is None else {**axes, "head": spec.head.part(spec.width).axes()}


def param_shapes(spec: ModelSpec) -> Params:
    """The parameters as ``jax.ShapeDtypeStruct``, without making them."""
    return cast(Params, jax.eval_shape(functools.partial(init_params, spec), jax.random.key(0)))


def unstack_layers(spec: ModelSpec, params: Params) -> Params:
    """The parameters with the stack as a tuple of single layers, the form that decoding takes."""
    return {**params, "stack": unstack(spec.stack, params["stack"])}


def cast_floats(tree: Any, dtype: Any) -> Any:
    """Every floating-point leaf in ``dtype``: a model computes in the dtype of the parameters that it is given."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def apply(
    spec: ModelSpec,
    params: Params,
    inputs: Inputs,
    *,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    remat: Remat = "none",
) -> Output:
    """Runs the model up to its final norm, in the dtype of ``params``.

    Args:
      spec: the model's shape.
      params: from :func:`init_params` (scanned), or :func:`unstack_layers` of them (unrolled; needed with a cache).
      inputs: int32 [batch, length].
      cache: from :func:`empty_cache`; the inputs are written to it, and attention reads from it.
      key: for dropout; None for none.
      remat: what is kept for the backward pass.
    """
    embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
    embed = spec.embedding.part(spec.width).bind(params["embedding"])
    x = embed(inputs.tokens, Context(inputs.positions, inputs.segments, embed_key))
    x, context = constrain(x, RESIDUAL), Context(inputs.positions, inputs.segments, stack_key)
    if isinstance(params["stack"], tuple):
        x, cache = _unrolled(spec, params, x, context, cache)
    else:
        x = scan_stack(spec.stack, params["stack"], x, context, remat)
    return Output(spec.final_norm.part(spec.width).bind(params["final_norm"])(x), cache)


def _unrolled(
    spec: ModelSpec, params: Params, x: jax.Array, context: Context, cache: Cache | None
) -> tuple[jax.Array, Cache | None]:
    if cache is None:
        return unrolled_stack(spec.stack, params["stack"], x, context)[0], None
    cache = cache.advance(context.positions, context.segments)
    x, layers = unrolled_stack(spec.stack, params["stack"], x, context, cache.layers, cache.view)
    return x, cache.written(layers, x.shape[1])


def output_table(spec: ModelSpec, params: Params) -> jax.Array:
    """The output table [padded vocab, embed]: the head's own, or the embedding's."""
    return cast(jax.Array, params["embedding" if spec.head is None else "head"]["table"])


def logits(spec: ModelSpec, params: Params, hidden: jax.Array) -> jax.Array:
    """Float32 logits [batch, length, padded vocab] of hidden states [batch, length, embed]; the padding is masked."""
    table = output_table(spec, params)
    scores = jnp.einsum("bld,vd->blv", hidden, table, preferred_element_type=jnp.float32)
    scores = constrain(scores, LOGITS)
    return jnp.where(jnp.arange(table.shape[0]) < spec.vocab, scores, MASKED)


def empty_cache(spec: ModelSpec, batch: int, slots: int, dtype: Any) -> Cache:
    """A cache of ``slots`` positions for every layer, with nothing in it."""
    layers = tuple(
        {
            name: {k: jnp.zeros(shape, dtype) for k, shape in sublayer.cache_streams(batch, slots).items()}
            for name, sublayer in zip(block.names(), block.sublayers, strict=True)
            if sublayer.cache_streams(batch, slots)
        }
        for block in spec.stack.blocks()
    )
    return Cache(layers, empty_view(batch, slots))
