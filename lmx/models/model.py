"""The functional Transformer: pure functions of a spec and plain parameter dicts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import jax
import jax.numpy as jnp

from lmx.errors import UserError
from lmx.kernels.cross_entropy import Readout, readout_logits
from lmx.kernels.masks import in_prefix
from lmx.models.block import RESIDUAL
from lmx.models.pipeline import run_layers
from lmx.models.specs import EncoderSpec, ModelSpec, Remat, StackSpec
from lmx.models.stack import decode_stack, init_stack, is_unstacked, stack_axes, stack_shapes, unstack, unstacked_axes
from lmx.models.stack import stepped as stepped_stack
from lmx.nn.cache import Cache, empty_view
from lmx.nn.context import Context, Memory
from lmx.nn.module import Params, Part
from lmx.sharding.rules import constrain

LOGITS = ("act_batch", "act_length", "act_vocab")
INPUTS = ["tokens", "positions", "segments", "types", "prefix"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=INPUTS, meta_fields=[])
@dataclass(frozen=True)
class Inputs:
    """What a model reads, int32 [batch, length] each: tokens, their positions, segment ids (0 is padding), token
    types (None: all 0), and bool [batch, length]: the positions that all of their segment sees in a decoder (None: none
    that come later)."""

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array
    types: jax.Array | None = None
    prefix: jax.Array | None = None

    @classmethod
    def whole(cls, tokens: jax.Array) -> "Inputs":
        """Tokens [batch, length] that are one document a row, without padding."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return cls(tokens, positions, jnp.ones_like(tokens))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hidden", "cache", "aux"], meta_fields=[])
@dataclass(frozen=True)
class Output:
    """Hidden states [batch, length, embed] after the final norm, the cache if one was given, and what the sublayers
    tell: by stack, segment, block and sublayer, arrays that start with the segment's repeats."""

    hidden: jax.Array
    cache: Cache | None = None
    aux: Params = field(default_factory=dict)


def _stack_parts(spec: ModelSpec | EncoderSpec, width: int) -> dict[str, Part]:
    """The parts beside a stack, those without parameters left out."""
    parts = {"embedding": spec.embedding.part(width)}
    if spec.final_norm is not None:
        parts["final_norm"] = spec.final_norm.part(width)
    if isinstance(spec, ModelSpec) and spec.head is not None:
        parts["head"] = spec.head.part(width)
    return {name: part for name, part in parts.items() if part.axes()}


def _tree(
    spec: ModelSpec, of_part: Callable[[Part, int], Params], of_stack: Callable[[StackSpec, int], Params]
) -> Params:
    """The parameters' tree; ``of_part`` and ``of_stack`` make its subtrees, each told a number of its own."""

    def one(spec_: ModelSpec | EncoderSpec, first: int) -> Params:
        parts = _stack_parts(spec_, spec.width)
        tree = {name: of_part(part, first + i) for i, (name, part) in enumerate(parts.items(), 1)}
        return {**tree, "stack": of_stack(spec_.stack, first)}

    tree = one(spec, 0)
    if spec.encoder is not None:
        tree["encoder"] = one(spec.encoder, 10)
    tasks = {task.name: of_part(task.part(spec.width), 20 + i) for i, task in enumerate(spec.tasks)}
    tasks = {name: own for name, own in tasks.items() if own}
    return {**tree, "tasks": tasks} if tasks else tree


def init_params(spec: ModelSpec, key: jax.Array) -> Params:
    """Fresh float32 parameters.

    ``embedding``, ``stack`` (leaves start with ``layers``), ``final_norm``, ``head``; in an encoder-decoder those of
    ``encoder`` in the same way; and ``tasks``.
    """
    return _tree(
        spec,
        lambda part, i: part.init(jax.random.fold_in(key, i)),
        lambda stack, i: init_stack(stack, spec.width, jax.random.fold_in(key, i)),
    )


def param_axes(spec: ModelSpec) -> Params:
    """The logical axes of every parameter, a tree parallel to :func:`init_params`'s."""
    return _tree(spec, lambda part, _: part.axes(), lambda stack, _: stack_axes(stack, spec.width))


def unstacked_param_axes(spec: ModelSpec) -> Params:
    """The logical axes of :func:`unstack_layers`'s parameters."""
    return _tree(spec, lambda part, _: part.axes(), lambda stack, _: unstacked_axes(stack, spec.width))


def param_shapes(spec: ModelSpec) -> Params:
    """The parameters as ``jax.ShapeDtypeStruct``, without making them."""
    return _tree(spec, lambda part, _: part.shapes(), lambda stack, _: stack_shapes(stack, spec.width))


def unstack_layers(spec: ModelSpec, params: Params) -> Params:
    """The parameters with each stack as single layers, the form that decoding takes."""
    out = {**params, "stack": unstack(spec.stack, params["stack"])}
    if spec.encoder is not None:
        encoder = params["encoder"]
        out["encoder"] = {**encoder, "stack": unstack(spec.encoder.stack, encoder["stack"])}
    return out


EXACT = ("correction", "absmax", "absmax_scale", "absmax_mean")
"""Leaves that stay as they are: a router's correction moves in steps that bfloat16 cannot tell apart; the scales of
quantized kernels multiply whole blocks."""


def cast_floats(tree: Any, dtype: Any) -> Any:
    """Every floating-point leaf in ``dtype``: a model computes in the dtype of the parameters that it is given."""

    def cast_leaf(path: Any, a: Any) -> Any:
        exact = jax.tree_util.keystr(path[-1:], simple=True) in EXACT
        return a if exact or not jnp.issubdtype(a.dtype, jnp.floating) else a.astype(dtype)

    return jax.tree.map_with_path(cast_leaf, tree)


def encode(
    spec: ModelSpec, params: Params, inputs: Inputs, *, key: jax.Array | None = None, remat: Remat = "none"
) -> tuple[Memory, Params]:
    """Runs the encoder of an encoder-decoder, once: what the decoder looks at, and what the sublayers tell.

    Raises:
      UserError: the model has no encoder.
    """
    if spec.encoder is None:
        raise UserError("this model has no encoder; call apply with its inputs alone")
    own = params["encoder"]
    x, context = embedded(spec.encoder, own, params["embedding"].get("table"), spec.width, inputs, key)
    x, aux = run_layers(spec.encoder.stack, own["stack"], x, context, remat)
    memory = Memory(normed(spec.encoder, own, spec.width, x), inputs.positions, inputs.segments)
    return memory, {"encoder": aux} if aux else {}


def apply(
    spec: ModelSpec,
    params: Params,
    inputs: Inputs,
    *,
    memory: Memory | None = None,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    remat: Remat = "none",
) -> Output:
    """Runs the model (of an encoder-decoder, the decoder) up to its final norm, in the dtype of ``params``.

    Args:
      spec: the model's shape.
      params: from :func:`init_params` (scanned), or :func:`unstack_layers` of them (unrolled; needed with a cache).
      inputs: int32 [batch, length].
      memory: from :func:`encode`; with a cache it is needed only once, the cache keeps it.
      cache: from :func:`empty_cache`; the inputs are written to it, and attention reads from it.
      key: for dropout; None for none.
      remat: what is kept for the backward pass.
    """
    x, context = embedded(spec, params, None, spec.width, inputs, key)
    context = replace(context, memory=memory)
    if cache is None:
        x, aux = run_layers(spec.stack, params["stack"], x, context, remat)
        return Output(normed(spec, params, spec.width, x), None, {"stack": aux} if aux else {})
    if not is_unstacked(params["stack"]):
        raise TypeError("a cache needs unstacked parameters: call unstack_layers first")
    # Later tokens see all of a prefix, being after it: only it needs to know that it is one.
    at = inputs.positions if inputs.prefix is None else in_prefix(inputs.positions, inputs.prefix)
    cache = cache.advance(at, inputs.segments)
    cache = cache if memory is None else cache.remember(memory.positions, memory.segments)
    x, layers = decode_stack(spec.stack, params["stack"], x, context, cache)
    return Output(normed(spec, params, spec.width, x), cache.written(layers, x.shape[1]))


def embedded(
    spec: ModelSpec | EncoderSpec, params: Params, table: Any, width: int, inputs: Inputs, key: jax.Array | None
) -> tuple[jax.Array, Context]:
    """The embedded inputs [batch, length, embed], and the context of the stack's sublayers."""
    embed_key, stack_key = (None, None) if key is None else jax.random.split(key)
    embed = spec.embedding.part(width).bind(params.get("embedding", {}))
    context = Context(inputs.positions, inputs.segments, embed_key, types=inputs.types, prefix=inputs.prefix)
    return constrain(embed(inputs.tokens, context, table), RESIDUAL), replace(context, key=stack_key)


def normed(spec: ModelSpec | EncoderSpec, params: Params, width: int, x: jax.Array) -> jax.Array:
    """Hidden states [batch, length, embed] after the final norm, where there is one."""
    if spec.final_norm is None:
        return x
    return cast(jax.Array, spec.final_norm.part(width).bind(params.get("final_norm", {}))(x))


def readout(spec: ModelSpec, params: Params, hidden: jax.Array) -> Readout:
    """What predicts tokens from hidden states [batch, length, embed]: apart, so that a loss may take it in chunks.

    Raises:
      UserError: the model has no head that predicts tokens.
    """
    if spec.head is None:
        raise UserError("this model has no head that predicts tokens; it has " + (_task_names(spec) or "no other"))
    head = params.get("head", {})
    table = params["embedding"]["table"] if spec.head.tied else head["table"]
    x = spec.head.part(spec.width).bind(head)(hidden)
    return Readout(x, table[...], head.get("bias"), spec.vocab, spec.head.softcap)


def logits(spec: ModelSpec, params: Params, hidden: jax.Array) -> jax.Array:
    """Float32 logits [batch, length, padded vocab] of hidden states [batch, length, embed]; the padding is masked."""
    return readout_logits(readout(spec, params, hidden), LOGITS)


def task(
    spec: ModelSpec, params: Params, name: str, hidden: jax.Array, inputs: Inputs, key: jax.Array | None = None
) -> jax.Array:
    """Float32 scores of a task head on hidden states [batch, length, embed]: [batch, outputs], or [batch, length,
    outputs] of a head that answers for each token.

    Raises:
      UserError: the model has no such head.
    """
    heads = {head.name: head for head in spec.tasks}
    if name not in heads:
        raise UserError(f"this model has no head {name!r}; it has {_task_names(spec) or 'none'}")
    bound = heads[name].part(spec.width).bind(params.get("tasks", {}).get(name, {}))
    return cast(jax.Array, bound(hidden, Context(inputs.positions, inputs.segments, key)))


def _task_names(spec: ModelSpec) -> str:
    return ", ".join(repr(head.name) for head in spec.tasks)


def aux_sum(aux: Params, name: str) -> jax.Array:
    """The sum over the layers of what the sublayers tell by this name ("loss": routers' own), a float32 scalar."""
    told = jax.tree.leaves_with_path(aux)
    return sum((a.sum() for path, a in told if path[-1].key.split("/")[-1] == name), jnp.float32(0))


def stepped(spec: ModelSpec, params: Params, aux: Params) -> Params:
    """The parameters after a train step in which the sublayers told ``aux``: a router's correction moves by a rule."""
    out = dict(params)
    if "stack" in aux:
        out["stack"] = stepped_stack(spec.stack, params["stack"], aux["stack"])
    if "encoder" in aux and spec.encoder is not None:
        moved = stepped_stack(spec.encoder.stack, params["encoder"]["stack"], aux["encoder"])
        out["encoder"] = {**params["encoder"], "stack": moved}
    return out


def empty_cache(spec: ModelSpec, batch: int, slots: int, dtype: Any, memory: int = 0) -> Cache:
    """A cache of ``slots`` positions for every layer, and of ``memory`` positions of an encoder, with nothing in it."""
    layers = tuple(
        {
            name: {k: jnp.zeros(shape, dtype) for k, shape in streams.items()}
            for name, sublayer in zip(block.names(), block.sublayers, strict=True)
            if (streams := sublayer.cache_streams(batch, slots, memory))
        }
        for block in spec.stack.blocks()
    )
    return Cache(layers, empty_view(batch, slots, memory))
