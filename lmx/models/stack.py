"""The stack of blocks: scanned over repeats for training, unrolled over single layers for decoding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp

from lmx.kernels.attention import SAVED
from lmx.models.block import block_part
from lmx.models.specs import BlockSpec, Remat, Segment, StackSpec
from lmx.nn.cache import CacheView, LayerCache, Streams
from lmx.nn.context import Context
from lmx.nn.module import Params

POLICIES: dict[str, Callable[..., bool]] = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def init_stack(spec: StackSpec, width: int, key: jax.Array) -> Params:
    """Fresh parameters: for each segment and block of its pattern a tree whose leaves start with ``layers``."""

    def init_segment(segment: Segment, key: jax.Array) -> Params:
        parts = {f"block_{i}": block_part(b, width) for i, b in enumerate(segment.pattern)}
        keys = jax.random.split(key, (len(parts), segment.repeats))
        return {name: jax.vmap(part.init)(keys[i]) for i, (name, part) in enumerate(parts.items())}

    keys = jax.random.split(key, len(spec.segments))
    return {f"segment_{i}": init_segment(s, keys[i]) for i, s in enumerate(spec.segments)}


def stack_axes(spec: StackSpec, width: int) -> Params:
    """The logical axes of :func:`init_stack`'s parameters."""

    def stacked(block: BlockSpec) -> Params:
        axes = block_part(block, width).axes()
        return cast(Params, jax.tree.map(lambda a: ("layers", *a), axes, is_leaf=lambda x: isinstance(x, tuple)))

    return {
        f"segment_{i}": {f"block_{j}": stacked(b) for j, b in enumerate(s.pattern)} for i, s in enumerate(spec.segments)
    }


def unstack(spec: StackSpec, params: Params) -> tuple[Params, ...]:
    """The stacked parameters as one tree for each layer, in the order of :meth:`StackSpec.blocks`."""
    layers = []
    for i, segment in enumerate(spec.segments):
        for repeat in range(segment.repeats):
            for j in range(len(segment.pattern)):
                layers.append(jax.tree.map(lambda a, r=repeat: a[r], params[f"segment_{i}"][f"block_{j}"]))
    return tuple(layers)


def scan_stack(spec: StackSpec, params: Params, x: jax.Array, context: Context, remat: Remat) -> jax.Array:
    """Hidden states [batch, length, embed] after every layer; compiles one copy of each block."""
    layer = 0
    for i, segment in enumerate(spec.segments):
        x = _scan_segment(segment, params[f"segment_{i}"], x, context, remat, layer)
        layer += segment.repeats * len(segment.pattern)
    return x


def _scan_segment(
    segment: Segment, params: Params, x: jax.Array, context: Context, remat: Remat, first_layer: int
) -> jax.Array:
    width, period = x.shape[-1], len(segment.pattern)

    def body(x: jax.Array, scanned: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
        repeat_params, repeat = scanned
        for j, block in enumerate(segment.pattern):
            module = block_part(block, width).bind(repeat_params[f"block_{j}"])
            x, _ = module(x, _contexts(block, context, first_layer + repeat * period + j))
        return x, None

    if remat != "none":
        body = jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (params, jnp.arange(segment.repeats)))[0]


def unrolled_stack(
    spec: StackSpec,
    params: tuple[Params, ...],
    x: jax.Array,
    context: Context,
    caches: tuple[Streams, ...] | None = None,
    view: CacheView | None = None,
) -> tuple[jax.Array, tuple[Streams, ...]]:
    """The same over unstacked parameters, a cache for each layer: what decoding compiles."""
    written = []
    for i, (block, layer) in enumerate(zip(spec.blocks(), params, strict=True)):
        contexts = _contexts(block, context, i)
        for name, streams in (caches[i] if caches else {}).items():
            contexts[name] = replace(contexts[name], cache=LayerCache(streams, cast(CacheView, view)))
        x, streams = block_part(block, x.shape[-1]).bind(layer)(x, contexts)
        written.append(streams)
    return x, tuple(written)


def _contexts(block: BlockSpec, context: Context, layer: Any) -> dict[str, Context]:
    """One context for each sublayer, with random keys of its own."""
    here = context.fold(layer)
    return {name: here.fold(i) for i, name in enumerate(block.names())}
