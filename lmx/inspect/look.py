"""Looks inside of a model: predictions, the logit lens, attention maps, gradient times input."""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.inspect.rows import UNKNOWN, Rows, rows_of
from lmx.kernels.telling import Heard, listening
from lmx.models.model import Inputs, cast_floats, embedded, logits, normed, unstack_layers
from lmx.models.specs import EncoderSpec, ModelSpec
from lmx.models.stack import decode_stack
from lmx.nn.context import Memory
from lmx.nn.module import Params

TOP = 5
"""Likeliest tokens that are told of each prediction."""


class Lens(NamedTuple):
    """What each layer would predict, if the final norm and the head came after it (nostalgebraist 2020). Layer 0 are
    the embeddings; the last one's are the model's own predictions.

    Float32 ``logprob``, int ``rank`` (0 is the likeliest) and float32 ``entropy`` [layers + 1, predictions] are the
    target's and the distribution's (nats); ``top`` int and ``top_logprob`` float32 [layers + 1, predictions, TOP].
    """

    logprob: np.ndarray
    rank: np.ndarray
    entropy: np.ndarray
    top: np.ndarray
    top_logprob: np.ndarray


@dataclass(frozen=True)
class Look:
    """What was seen.

    Attributes:
      rows: what was read, and where predictions stand.
      targets: int [predictions], the tokens whose probability is told: those of the text, or, where there is none, the
        likeliest.
      lens: of each layer.
      attention: by stack and kind ("self", "cross", "encoder"), float32 [layers, heads, queries, keys]: what each query
        takes of each key in the text as it is. Rows sum to 1, less what attention sinks take.
      attribution: float32 [predictions, length]: the gradient of the target's log-probability with respect to each
        token's embedded vector, times that vector (Shrikumar et al. 2017): how it would change, to first order and in
        proportion, if the vector grew.
      source_attribution: the same for the encoder's tokens, [predictions, source_length], or None.
    """

    rows: Rows
    targets: np.ndarray
    lens: Lens
    attention: dict[str, np.ndarray]
    attribution: np.ndarray
    source_attribution: np.ndarray | None = None


def look(model: Model, text: str, target: str = "") -> Look:
    """Looks at what a model makes of a text.

    Args:
      model: a loaded one, on one device.
      text: what it reads: see :func:`lmx.inspect.rows.rows_of`.
      target: of an encoder-decoder, or a decoder that learned to go on with a prefix, what it would write; by default
        what it does write.

    Raises:
      UserError: a model on a mesh, one that predicts no tokens, or a text that does not fit.
    """
    if model.sharding is not None:
        raise UserError("a model on a mesh cannot be looked into; load it without one")
    rows, spec = rows_of(model, text, target), model.spec
    read = rows.inputs, rows.source_inputs
    dtype = model.compute or model.params["embedding"]["table"].dtype
    params = jax.jit(lambda p: unstack_layers(spec, cast_floats(p, dtype)))(model.params)
    states, heard, encoder_heard = _states(spec, params, *read, rows.row, rows.at)
    targets, lens = _lens(spec, params, states, rows.targets)
    attribution, source = _attribution(spec, params, *read, rows.row, rows.at, targets)
    kinds = {"encoder": (encoder_heard, "attention"), "self": (heard, "attention"), "cross": (heard, "cross_attention")}
    maps = {kind: np.asarray(told[name]) for kind, (told, name) in kinds.items() if name in told}
    whole = None if source is None else np.asarray(source)
    return Look(rows, np.asarray(targets), Lens(*map(np.asarray, lens)), maps, np.asarray(attribution), whole)


def _memory(spec: ModelSpec, params: Params, x: jax.Array, inputs: Inputs) -> Memory:
    """What the decoder looks at, of the encoder's embedded inputs [batch, length, embed]."""
    assert spec.encoder is not None
    own = params["encoder"]
    hidden = _through(spec.encoder, own, params["embedding"].get("table"), spec.width, x, inputs, None)
    return Memory(normed(spec.encoder, own, spec.width, hidden), inputs.positions, inputs.segments)


def _through(
    spec: ModelSpec | EncoderSpec, params: Params, table: Any, width: int, x: jax.Array, inputs: Inputs, memory: Any
) -> jax.Array:
    """Hidden states after the layers, before the final norm, of embedded inputs ``x``."""
    context = replace(embedded(spec, params, table, width, inputs, None)[1], memory=memory)
    return decode_stack(spec.stack, params["stack"], x, context)[0]


def _embedded(spec: ModelSpec, params: Params, inputs: Inputs) -> jax.Array:
    return embedded(spec, params, None, spec.width, inputs, None)[0]


def _source(spec: ModelSpec, params: Params, source: Inputs) -> jax.Array:
    assert spec.encoder is not None
    table = params["embedding"].get("table")
    return embedded(spec.encoder, params["encoder"], table, spec.width, source, None)[0]


@functools.partial(jax.jit, static_argnums=0)
def _states(
    spec: ModelSpec, params: Params, inputs: Inputs, source: Inputs | None, row: jax.Array, at: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Hidden states [layers + 1, predictions, embed] where predictions stand, and the maps of the first row."""
    encoder_heard: Heard = []
    memory = None
    if source is not None:
        with listening() as encoder_heard:
            memory = _memory(spec, params, _source(spec, params, source), source)
    x = _embedded(spec, params, inputs)
    with listening() as heard:
        _through(spec, params, None, spec.width, x, inputs, memory)
    layers = [value for name, value in heard if name == "hidden"]
    return jnp.stack([layer[row, at] for layer in layers]), _maps(heard), _maps(encoder_heard)


def _maps(heard: Heard) -> dict[str, jax.Array]:
    names = dict.fromkeys(name for name, _ in heard if name != "hidden")
    return {name: jnp.stack([value[0] for own, value in heard if own == name]) for name in names}


@functools.partial(jax.jit, static_argnums=0)
def _lens(spec: ModelSpec, params: Params, states: jax.Array, targets: jax.Array) -> tuple[jax.Array, Lens]:
    """The targets, those that are not known filled in with the likeliest token, and what each layer says of them."""

    def scores(hidden: jax.Array) -> jax.Array:
        found = logits(spec, params, normed(spec, params, spec.width, hidden[None]))
        return jax.nn.log_softmax(found[0, :, : spec.vocab])

    targets = jnp.where(targets == UNKNOWN, scores(states[-1]).argmax(-1), targets)

    def layer(hidden: jax.Array) -> Any:
        found = scores(hidden)
        own = jnp.take_along_axis(found, targets[:, None], axis=-1)
        top_logprob, top = jax.lax.top_k(found, min(TOP, spec.vocab))
        entropy = -(jnp.exp(found) * found).sum(-1)
        return Lens(own[:, 0], (found > own).sum(-1), entropy, top, top_logprob)  # type: ignore[arg-type]

    return targets, jax.lax.map(layer, states)


@functools.partial(jax.jit, static_argnums=0)
def _attribution(
    spec: ModelSpec,
    params: Params,
    inputs: Inputs,
    source: Inputs | None,
    row: jax.Array,
    at: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Float32 [predictions, length] and [predictions, source_length]: see :class:`Look`."""
    x = _embedded(spec, params, inputs)
    read = None if source is None else _source(spec, params, source)

    def one(asked: Any) -> Any:
        row, at, target = asked
        own, its = x[row][None], jax.tree.map(lambda a: a[row][None], inputs)

        def logprob(own: jax.Array, first: jax.Array | None) -> jax.Array:
            memory = None if first is None or source is None else _memory(spec, params, first, source)
            hidden = _through(spec, params, None, spec.width, own, its, memory)
            found = normed(spec, params, spec.width, hidden)[:, at][:, None]
            return jax.nn.log_softmax(logits(spec, params, found)[0, 0, : spec.vocab])[target]

        both = (own, read)
        gradients = jax.grad(logprob, argnums=(0, 1))(*both)
        return jax.tree.map(lambda g, v: (g * v).astype(jnp.float32).sum(-1)[0], gradients, both)

    found: tuple[jax.Array, jax.Array | None] = jax.lax.map(one, (row, at, targets))
    return found
