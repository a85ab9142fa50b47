"""The decoding loop as two jitted programs: prefill, and a chunk of single-token steps over a donated cache."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp

from lmx.decode.sampling import Filters, choose
from lmx.models.model import Inputs, apply, empty_cache, encode, logits
from lmx.models.specs import ModelSpec
from lmx.nn.cache import Cache
from lmx.nn.module import Params
from lmx.sharding.rules import Sharding, constrain, use_sharding

P = ParamSpec("P")
T = TypeVar("T")
FIELDS = ["cache", "token", "logprob", "position", "index", "seeds", "seen", "done", "stops", "values"]


@dataclass(frozen=True)
class Program:
    """What a compiled loop depends on beside the arrays' shapes: ``sharding`` has the rules for unrolled layers; ids
    below ``known`` can be drawn, None for all of the model's."""

    spec: ModelSpec
    filters: Filters
    sharding: Sharding | None = None
    known: int | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=FIELDS, meta_fields=[])
@dataclass(frozen=True)
class Decoding:
    """The state between steps.

    ``token`` int32 [batch] is chosen and not yet in the cache; ``logprob`` is its log-probability; ``position`` is
    where it will stand and ``index`` its number in the completion; ``seeds`` holds one PRNG key a row; ``seen`` is
    bool [batch, vocab] or [batch, 0]; ``done`` bool [batch]; ``stops`` int32 [stops] ends a row; ``values`` are the
    sampling's.
    """

    cache: Cache
    token: jax.Array
    logprob: jax.Array
    position: jax.Array
    index: jax.Array
    seeds: jax.Array
    seen: jax.Array
    done: jax.Array
    stops: jax.Array
    values: dict[str, jax.Array]


def _on_mesh(function: Callable[P, T]) -> Callable[P, T]:
    """The function, traced with the sharding of its first argument, a program."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with use_sharding(cast(Program, args[0]).sharding):
            return function(*args, **kwargs)

    return run


@functools.partial(jax.jit, static_argnames=("program", "slots"))
@_on_mesh
def prefill(
    program: Program,
    params: Params,
    inputs: Inputs,
    seeds: jax.Array,
    stops: jax.Array,
    values: dict[str, jax.Array],
    *,
    slots: int,
    source: Inputs | None = None,
) -> Decoding:
    """Reads the prompts and chooses each row's first token.

    Args:
      program: the model's shape, the sampling filters and the layout.
      params: with unstacked layers, in the dtype to compute in.
      inputs: prompts [batch, length], padded on the left with segment 0, so that all rows write the same slots.
      seeds: one PRNG key a row.
      stops: int32 [stops], tokens that end a row.
      values: the sampling's.
      slots: cache positions; prompts and completions must fit.
      source: what the encoder of an encoder-decoder reads, [batch, source_length]; ``inputs`` are then what the
        decoder starts with.
    """
    spec, batch = program.spec, inputs.tokens.shape[0]
    memory = None if source is None else encode(spec, params, source)[0]
    length = 0 if source is None else source.tokens.shape[1]
    cache = empty_cache(spec, batch, slots, params["embedding"]["table"].dtype, length)
    out = apply(spec, params, inputs, memory=memory, cache=cache)
    seen = jnp.zeros((batch, spec.vocab if program.filters.penalised else 0), bool)
    if program.filters.penalised:
        rows = jnp.arange(batch)[:, None]
        seen = seen.at[rows, inputs.tokens].max(inputs.segments > 0)
    zero = jnp.zeros(batch, jnp.int32)
    state = Decoding(
        cache=_present(out.cache),
        token=zero,
        logprob=zero.astype(jnp.float32),
        position=inputs.positions[:, -1],
        index=zero - 1,
        seeds=seeds,
        seen=seen,
        done=zero.astype(bool),
        stops=stops,
        values=values,
    )
    return _chosen(program, params, state, out.hidden[:, -1:])


@functools.partial(jax.jit, static_argnames=("program", "steps"), donate_argnames=("state",))
@_on_mesh
def decode_chunk(
    program: Program, params: Params, state: Decoding, count: jax.Array | int, *, steps: int
) -> tuple[Decoding, jax.Array, jax.Array]:
    """Emits up to ``count`` (at most ``steps``) tokens a row: the one chosen already, and those that follow it.

    Returns:
      The state (the old one is donated), int32 tokens [batch, steps] and their float32 log-probabilities, which every
      device has whole. A row that is done, or whose stop token was emitted, holds -1 from there on.
    """
    batch = state.token.shape[0]
    tokens, logprobs = jnp.full((batch, steps), -1, jnp.int32), jnp.zeros((batch, steps), jnp.float32)

    def going(carry: Any) -> jax.Array:
        step, state, _, _ = carry
        return (step < count) & ~state.done.all()

    def body(carry: Any) -> Any:
        step, state, tokens, logprobs = carry
        emitted = jnp.where(state.done, -1, state.token)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, emitted[:, None], step, axis=1)
        logprobs = jax.lax.dynamic_update_slice_in_dim(logprobs, state.logprob[:, None], step, axis=1)
        ended = state.done | (state.token[:, None] == state.stops).any(-1)
        return step + 1, advance(program, params, state, ended), tokens, logprobs

    _, state, tokens, logprobs = jax.lax.while_loop(going, body, (jnp.int32(0), state, tokens, logprobs))
    return state, constrain(tokens, (None, None)), constrain(logprobs, (None, None))


def advance(program: Program, params: Params, state: Decoding, done: jax.Array) -> Decoding:
    """Writes the chosen token to the cache and chooses the next."""
    column = lambda a: a[:, None]  # noqa: E731
    position = constrain(state.position + 1, ("act_batch",))
    inputs = Inputs(column(state.token), column(position), jnp.ones_like(column(position)))
    out = apply(program.spec, params, inputs, cache=state.cache)
    state = replace(state, cache=_present(out.cache), position=position, done=done)
    return _chosen(program, params, state, out.hidden)


def _chosen(program: Program, params: Params, state: Decoding, hidden: jax.Array) -> Decoding:
    """Chooses a token from hidden states [batch, 1, embed]."""
    scores = logits(program.spec, params, hidden)[:, 0, : program.spec.vocab]
    index = state.index + 1
    keys = jax.vmap(jax.random.fold_in)(state.seeds, index)
    token, logprob = choose(program.filters, state.values, scores, state.seen, keys, program.known)
    seen = state.seen
    if program.filters.penalised:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    return replace(state, token=token, logprob=logprob, index=index, seen=seen)


def _present(cache: Cache | None) -> Cache:
    assert cache is not None
    return cache
