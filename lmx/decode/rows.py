"""The rows that one pass of a loaded model reads: texts that are padded, and tokens that are checked."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.data.tokenizer import Encoded
from lmx.errors import UserError
from lmx.models.model import Inputs
from lmx.models.specs import ModelSpec
from lmx.sharding.rules import Sharding

BUCKET = 32
"""Rows of texts are padded to multiples of this, so that few lengths are ever compiled."""


def are_texts(inputs: Any) -> bool:
    """Whether these are texts or pairs of texts, and not tokens."""
    first = inputs[0] if len(inputs) else ""
    return isinstance(inputs, str) or isinstance(first, str) or (len(first) == 2 and isinstance(first[0], str))


def of_tokens(spec: ModelSpec, tokens: Any, decoder_tokens: Any = None) -> tuple[Inputs, Inputs | None]:
    """Tokens [batch, length] without padding, and an encoder-decoder's decoder tokens if they are given.

    Raises:
      UserError: other arrays, tokens outside the vocabulary, rows beyond the context, or decoder tokens without a use.
    """
    inputs = Inputs.whole(_checked(spec, tokens, "tokens"))
    if decoder_tokens is None:
        return inputs, None
    if spec.encoder is None:
        raise UserError("this model has one stack, so it takes no decoder tokens")
    decoder = Inputs.whole(_checked(spec, decoder_tokens, "decoder tokens"))
    if len(decoder.tokens) != len(inputs.tokens):
        raise UserError(f"there are {len(inputs.tokens)} rows of tokens and {len(decoder.tokens)} of the decoder's")
    return inputs, decoder


def of_texts(spec: ModelSpec, texts: Sequence[Encoded]) -> Inputs:
    """Texts as rows, padded on the right (segment 0) to a multiple of BUCKET or to the context.

    Raises:
      UserError: no text, one without tokens, or one that is longer than the context.
    """
    if not texts or not all(text.ids for text in texts):
        raise UserError("there is nothing to read: give at least one text, and no empty one")
    longest = max(len(text.ids) for text in texts)
    _check_length(spec, longest, "a text has")
    length = max(longest, min(-(-longest // BUCKET) * BUCKET, spec.context))
    tokens, types, segments = (np.zeros((len(texts), length), np.int32) for _ in range(3))
    for i, text in enumerate(texts):
        tokens[i, : len(text.ids)], types[i, : len(text.ids)] = text.ids, text.types
        segments[i, : len(text.ids)] = 1
    positions = np.maximum(np.cumsum(segments, axis=1, dtype=np.int32) - 1, 0)
    inputs = Inputs(*(jnp.asarray(a) for a in (tokens, positions, segments)))
    return replace(inputs, types=jnp.asarray(types)) if (spec.encoder or spec).embedding.types > 1 else inputs


def shifted(inputs: Inputs, start: int) -> Inputs:
    """What a decoder reads of its encoder's inputs where it classifies them: the same, one token late."""
    first = jnp.full_like(inputs.tokens[:, :1], start)
    return Inputs(jnp.concatenate([first, inputs.tokens[:, :-1]], axis=1), inputs.positions, inputs.segments)


def divisible(inputs: Inputs, sharding: Sharding | None) -> Inputs:
    """The inputs as the mesh takes them: the last row repeated, and padding (segment 0) on the right, until it divides
    batch and length."""
    if sharding is None:
        return inputs
    axes, (rows, length) = ("act_batch", "act_length"), inputs.tokens.shape
    ways = math.lcm(sharding.ways("act_length"), sharding.ways("act_residual"))
    missing = (0, -rows % sharding.ways("act_batch")), (0, -length % ways)

    def fitted(array: jax.Array) -> jax.Array:
        padded = np.pad(np.asarray(array), ((0, 0), missing[1]))
        return sharding.put(np.pad(padded, (missing[0], (0, 0)), mode="edge"), axes)

    return jax.tree.map(fitted, inputs)


def _checked(spec: ModelSpec, values: Any, what: str) -> jax.Array:
    tokens = np.asarray(values)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{what} have shape {tokens.shape} and dtype {tokens.dtype}, expected integers [batch, length]")
    _check_length(spec, tokens.shape[1], "rows have")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < spec.vocab:
        raise UserError(f"token {tokens.max()} or {tokens.min()} is outside the vocabulary of {spec.vocab}")
    return jnp.asarray(tokens, jnp.int32)


def _check_length(spec: ModelSpec, length: int, what: str) -> None:
    if length > spec.context:
        raise UserError(f"{what} {length} tokens, which exceed the model's context of {spec.context}")
