"""What is read to look inside of each kind of model, and where its predictions stand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from lmx.decode.forward import is_encoder
from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.models.model import Inputs
from lmx.objectives.vocabulary import Vocabulary

LONGEST = 128
"""Tokens that are looked at in one text."""
MASK = "[MASK]"
UNKNOWN = -1


@dataclass(frozen=True)
class Rows:
    """Rows without padding, the first of them the text as it is, and the predictions that are looked at.

    Attributes:
      tokens: int32 [rows, length], what the (decoder's) stack reads.
      source: int32 [1, source_length], what an encoder-decoder's encoder reads, or None.
      row: int [predictions], in which row each prediction stands.
      at: int [predictions], where in the row.
      place: int [predictions], which token is predicted: its place in the text; its length for the one that would
        come next.
      targets: int [predictions], that token; -1 where it is not known.
      prefix: how many tokens at the front of a decoder's row see all of each other.
    """

    tokens: np.ndarray
    source: np.ndarray | None
    row: np.ndarray
    at: np.ndarray
    place: np.ndarray
    targets: np.ndarray
    prefix: int = 0

    @property
    def inputs(self) -> Inputs:
        """What the (decoder's) stack reads."""
        whole = Inputs.whole(jnp.asarray(self.tokens))
        return replace(whole, prefix=whole.positions < self.prefix) if self.prefix else whole

    @property
    def source_inputs(self) -> Inputs | None:
        """What the encoder reads, if there is one."""
        return None if self.source is None else Inputs.whole(jnp.asarray(self.source))


def rows_of(model: Model, text: str, target: str = "") -> Rows:
    """The rows of a text.

    Of a decoder each token is predicted from those before it, and the one that comes next. Of an encoder, the tokens
    that are ``[MASK]`` in the text; if there are none, every token, where it alone is masked. Of an encoder-decoder,
    and of a decoder that learned to go on with a prefix, the tokens of ``target``, from ``text`` and those before them.

    Raises:
      UserError: a model that predicts no tokens or has no tokenizer, a text without tokens or with too many, or a
        target without use.
    """
    if model.spec.head is None:
        raise UserError(f"this {model.config.family} has no head that predicts tokens, so there is nothing to look at")
    if model.reads_prefix:
        return _prefix(model, text, target)
    if target and model.spec.encoder is None:
        raise UserError("this model has one stack, so it takes no target; put all of it into the text")
    if model.spec.encoder is not None:
        return _encoder_decoder(model, text, target)
    return (_encoder if is_encoder(model.spec) else _decoder)(model, text)


def _decoder(model: Model, text: str) -> Rows:
    tokens = _checked(model, model.prompts.encode(text))
    return _next(tokens, None)


def _prefix(model: Model, text: str, target: str) -> Rows:
    prefix = model.prompts.encode(text)
    tokens = _checked(model, [*prefix, *_target(model, text, target)])
    rows, first = _next(tokens, None), len(prefix) - 1
    own = {name: getattr(rows, name)[first:] for name in ("row", "at", "place", "targets")}
    return replace(rows, prefix=len(prefix), **own)


def _encoder_decoder(model: Model, text: str, target: str) -> Rows:
    assert model.spec.encoder is not None
    source = _checked(model, model.tokenize([text])[0].ids)
    tokens = _checked(model, [model.spec.encoder.decoder_start, *_target(model, text, target)])
    return _next(tokens, np.array([source], np.int32))


def _target(model: Model, text: str, target: str) -> list[int]:
    """The tokens of a target; by default what the model itself makes of the text, the likeliest token each time."""
    if target:
        return model.prompts.texts.of_targets.encode_prompts([target], around=False)[0].ids
    read = 1 if model.spec.encoder else len(model.prompts.encode(text))
    most = max(1, min(32, min(LONGEST, model.spec.context) - read))
    return list(model.generate([text], temperature=0, max_new_tokens=most)[0].tokens)


def _next(tokens: Sequence[int], source: np.ndarray | None) -> Rows:
    at = np.arange(len(tokens))
    targets = np.array([*tokens[1:], UNKNOWN])
    return Rows(np.array([tokens], np.int32), source, np.zeros_like(at), at, at + 1, targets)


def _encoder(model: Model, text: str) -> Rows:
    tokenizer = model.prompts.texts
    mask = Vocabulary.of(tokenizer, [MASK]).special[MASK]
    tokens = np.array(_checked(model, model.tokenize([text])[0].ids), np.int32)
    given = np.flatnonzero(tokens == mask)
    if len(given):
        return Rows(tokens[None], None, np.zeros_like(given), given, given, np.full(len(given), UNKNOWN))
    places = np.flatnonzero(tokenizer.token_bytes()[tokens] > 0)  # not the special tokens around
    rows = np.repeat(tokens[None], len(places) + 1, axis=0)
    rows[np.arange(1, len(rows)), places] = mask
    return Rows(rows, None, np.arange(1, len(rows)), places, places, tokens[places])


def _checked(model: Model, ids: Sequence[int]) -> list[int]:
    longest = min(LONGEST, model.spec.context)
    if not 0 < len(ids) <= longest:
        raise UserError(
            f"the text has {len(ids)} tokens, expected 1 to {longest}: maps of attention grow with the square of them"
        )
    return list(ids)
