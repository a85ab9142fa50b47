"""The stack of blocks: scanned over repeats for training, unrolled over single layers for decoding."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp

from lmx.kernels.attention import SAVED
from lmx.kernels.telling import tell
from lmx.models.block import block_part
from lmx.models.specs import BlockSpec, Remat, Segment, StackSpec
from lmx.nn.cache import Cache, LayerCache, Streams
from lmx.nn.context import Context
from lmx.nn.kernel import opened
from lmx.nn.module import Params, Part

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
    params = {f"segment_{i}": init_segment(s, keys[i]) for i, s in enumerate(spec.segments)}
    shared = {s.name: s.part().init(jax.random.fold_in(key, i)) for i, s in enumerate(spec.shared)}
    return {**params, "shared": shared} if shared else params


def stack_axes(spec: StackSpec, width: int) -> Params:
    """The logical axes of :func:`init_stack`'s parameters; only the longest segment's layers are an axis to split."""

    def stacked(part: Part, segment: int) -> Params:
        name = "layers" if segment == spec.longest else None
        return cast(Params, jax.tree.map(lambda a: (name, *a), part.axes(), is_leaf=lambda x: isinstance(x, tuple)))

    return _stacked(spec, width, stacked, Part.axes)


def stack_shapes(spec: StackSpec, width: int) -> Params:
    """The shapes and dtypes of :func:`init_stack`'s parameters."""

    def stacked(part: Part, segment: int) -> Params:
        repeats = spec.segments[segment].repeats
        return cast(Params, jax.tree.map(lambda s: jax.ShapeDtypeStruct((repeats, *s.shape), s.dtype), part.shapes()))

    return _stacked(spec, width, stacked, Part.shapes)


def _stacked(
    spec: StackSpec, width: int, of_block: Callable[[Part, int], Params], of_shared: Callable[[Part], Params]
) -> Params:
    """The tree of :func:`init_stack`; ``of_block`` makes a block's subtree and is told its segment."""
    tree = {
        f"segment_{i}": {f"block_{j}": of_block(block_part(b, width), i) for j, b in enumerate(s.pattern)}
        for i, s in enumerate(spec.segments)
    }
    shared = {s.name: of_shared(s.part()) for s in spec.shared}
    return {**tree, "shared": shared} if shared else tree


def unstacked_axes(spec: StackSpec, width: int) -> Params:
    """The logical axes of :func:`unstack`'s parameters."""
    shared = {s.name: s.part().axes() for s in spec.shared}
    return {"layers": tuple(block_part(block, width).axes() for block in spec.blocks()), "shared": shared}


def unstack(spec: StackSpec, params: Params) -> Params:
    """The stacked parameters as ``layers``, one tree for each in the order of :meth:`StackSpec.blocks`, and
    ``shared``."""
    layers = []
    for i, segment in enumerate(spec.segments):
        for repeat in range(segment.repeats):
            for j in range(len(segment.pattern)):
                layers.append(jax.tree.map(lambda a, r=repeat: a[r], params[f"segment_{i}"][f"block_{j}"]))
    return {"layers": tuple(layers), "shared": params.get("shared", {})}


def is_unstacked(params: Params) -> bool:
    """Whether a stack's parameters come from :func:`unstack`."""
    return "layers" in params


def run_segment(
    segment: Segment, params: Params, x: jax.Array, context: Context, remat: Remat, first_layer: Any
) -> tuple[jax.Array, Params]:
    """Hidden states [batch, length, embed] after a segment's layers, scanned, and what the sublayers tell.

    ``first_layer`` is the number of its first layer in the stack: random keys go by it.
    """
    width, period = x.shape[-1], len(segment.pattern)

    def body(x: jax.Array, scanned: tuple[Params, jax.Array]) -> tuple[jax.Array, Params]:
        repeat_params, repeat = scanned
        aux = {}
        for j, block in enumerate(segment.pattern):
            module = block_part(block, width).bind(opened(repeat_params[f"block_{j}"], x.dtype))
            out = module(x, _contexts(block, context, first_layer + repeat * period + j))
            x, aux[f"block_{j}"] = out.hidden, out.aux
        return x, {name: told for name, told in aux.items() if told}

    if remat != "none":
        body = jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=False)
    return cast(tuple[jax.Array, Params], jax.lax.scan(body, x, (params, jnp.arange(segment.repeats))))


def run_stack(
    spec: StackSpec,
    params: Params,
    x: jax.Array,
    context: Context,
    remat: Remat = "none",
    longest: Callable[..., tuple[jax.Array, Params]] = run_segment,
) -> tuple[jax.Array, Params]:
    """Hidden states [batch, length, embed] after every layer, and what the sublayers tell.

    Scanned, which compiles one copy of each block, or over unstacked parameters layer by layer. ``longest`` runs the
    longest segment, by whatever way it takes.
    """
    if is_unstacked(params):
        return decode_stack(spec, params, x, context)[0], {}
    context = replace(context, shared=params.get("shared", {}))
    layer, aux = 0, {}
    for i, segment in enumerate(spec.segments):
        run = longest if i == spec.longest else run_segment
        x, told = run(segment, params[f"segment_{i}"], x, context, remat, layer)
        aux[f"segment_{i}"] = told
        layer += segment.repeats * len(segment.pattern)
    return x, {name: told for name, told in aux.items() if told}


def decode_stack(
    spec: StackSpec, params: Params, x: jax.Array, context: Context, cache: Cache | None = None
) -> tuple[jax.Array, tuple[Streams, ...]]:
    """The same over unstacked parameters, a cache for each layer: what decoding compiles. Tells the ``hidden`` states,
    before the first layer and after each."""
    context, written = replace(context, shared=params["shared"]), []
    tell("hidden", functools.partial(jnp.asarray, x))
    for i, (block, layer) in enumerate(zip(spec.blocks(), params["layers"], strict=True)):
        contexts = _contexts(block, context, i)
        for name, streams in (cache.layers[i] if cache else {}).items():
            contexts[name] = replace(contexts[name], cache=LayerCache(streams, cast(Cache, cache).view))
        out = block_part(block, x.shape[-1]).bind(opened(layer, x.dtype))(x, contexts)
        x = out.hidden
        tell("hidden", functools.partial(jnp.asarray, x))
        written.append(out.streams)
    return x, tuple(written)


def stepped(spec: StackSpec, params: Params, aux: Params) -> Params:
    """The stack's parameters after a train step in which the sublayers told ``aux``: see ``Sublayer.stepped``."""
    out = dict(params)
    for name, blocks in aux.items():
        pattern = spec.segments[int(name.rsplit("_", 1)[1])].pattern
        out[name] = dict(params[name])
        for block, told in blocks.items():
            here = pattern[int(block.rsplit("_", 1)[1])]
            sublayers = dict(zip(here.names(), here.sublayers, strict=True))
            moved = {n: sublayers[n].stepped(params[name][block][n], t) for n, t in told.items()}
            out[name][block] = {**params[name][block], **moved}
    return out


def _contexts(block: BlockSpec, context: Context, layer: Any) -> dict[str, Context]:
    """One context for each sublayer, with random keys of its own."""
    here = replace(context.fold(layer), layer=layer)
    return {name: here.fold(i) for i, name in enumerate(block.names())}
