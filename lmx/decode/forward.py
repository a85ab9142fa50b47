"""One pass of a loaded model over whole rows: logits, the scores of a task head, embeddings."""

import functools

import jax
import jax.numpy as jnp

from lmx.models import model
from lmx.models.model import Inputs
from lmx.models.specs import ModelSpec
from lmx.nn.context import Memory
from lmx.nn.head import pooled
from lmx.nn.module import Params
from lmx.sharding.rules import Sharding, use_sharding

POOLED = "pooled"
"""The head that gives an embedding."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def token_logits(
    spec: ModelSpec, sharding: Sharding | None, params: Params, inputs: Inputs, decoder: Inputs | None
) -> jax.Array:
    """Float32 [batch, length, vocab]; of an encoder-decoder, where the decoder's inputs stand."""
    with use_sharding(sharding):
        hidden, _ = _hidden(spec, params, inputs, decoder)
        return model.logits(spec, params, hidden)[..., : spec.vocab]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def task_scores(
    spec: ModelSpec, sharding: Sharding | None, head: str, params: Params, inputs: Inputs, decoder: Inputs | None
) -> jax.Array:
    """Float32 [batch, outputs] or [batch, length, outputs] of a task head."""
    with use_sharding(sharding):
        hidden, _ = _hidden(spec, params, inputs, decoder)
        return model.task(spec, params, head, hidden, inputs if decoder is None else decoder)


@functools.partial(jax.jit, static_argnums=(0, 1))
def embedding(spec: ModelSpec, sharding: Sharding | None, params: Params, inputs: Inputs) -> jax.Array:
    """Float32 [batch, embed]: the model's own pooled embedding if it has one, else the mean over the tokens (of an
    encoder-decoder, of its encoder)."""
    with use_sharding(sharding):
        if spec.encoder is not None:
            memory, _ = model.encode(spec, params, inputs)
            return pooled(memory.hidden.astype(jnp.float32), inputs.segments, "mean")
        hidden = model.apply(spec, params, inputs).hidden
        if any(head.name == POOLED for head in spec.tasks):
            return model.task(spec, params, POOLED, hidden, inputs)
        return pooled(hidden.astype(jnp.float32), inputs.segments, "mean")


def is_encoder(spec: ModelSpec) -> bool:
    """Whether a model of one stack is an encoder: a position sees what comes after it."""
    return spec.encoder is None and spec.stack.looks_ahead


def _hidden(spec: ModelSpec, params: Params, inputs: Inputs, decoder: Inputs | None) -> tuple[jax.Array, Memory | None]:
    if decoder is None:
        return model.apply(spec, params, inputs).hidden, None
    memory, _ = model.encode(spec, params, inputs)
    return model.apply(spec, params, decoder, memory=memory).hidden, memory
