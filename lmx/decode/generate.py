"""From prompts to completions: padding, the compiled loop, stop strings, and text as it comes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lmx.data.tokenizer import TextStream, TextTokenizer
from lmx.decode.loop import Decoding, Program, decode_chunk, prefill
from lmx.decode.pace import STEADY, Pace
from lmx.decode.places import Places
from lmx.decode.sampling import Sampling
from lmx.errors import UserError
from lmx.models.model import Inputs
from lmx.models.specs import ModelSpec
from lmx.nn.module import Params

BUCKET = 64
"""Prompts and caches are padded to multiples of this, so that few lengths are ever compiled."""


@dataclass(frozen=True)
class Completion:
    """A prompt's continuation. ``logprobs`` are natural, under the model's own distribution (no temperature); the
    tokens include the stop token that ended them, the text does not."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


@dataclass
class Row:
    """One prompt's progress."""

    stream: TextStream
    stops: frozenset[int]
    stop_strings: tuple[str, ...]
    limit: int
    text: str = ""
    shown: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def push(self, token: int, logprob: float) -> None:
        """Takes one token, unless the row has finished."""
        if self.finish_reason or token < 0:
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.stops:
            self.finish("stop")
            return
        self.text += self.stream.push(token)
        found = [self.text.find(s) for s in self.stop_strings if s in self.text]
        if found:
            self.text = self.text[: min(found)]
            self.finish_reason = "stop"
        elif len(self.tokens) == self.limit:
            self.finish("length")

    def finish(self, reason: Literal["stop", "length"]) -> None:
        """Ends the row, with what the byte stream still held back."""
        self.text += self.stream.flush()
        found = [self.text.find(s) for s in self.stop_strings if s in self.text]
        self.text = self.text[: min(found)] if found else self.text
        self.finish_reason = reason

    def news(self) -> str:
        """The text that is certain and was not shown yet: nothing that may turn out to begin a stop string."""
        held = 0 if self.finish_reason else max((len(s) - 1 for s in self.stop_strings), default=0)
        end = max(self.shown, len(self.text) - held)
        piece, self.shown = self.text[self.shown : end], end
        return piece


@dataclass(frozen=True)
class Generator:
    """A model ready to decode.

    Attributes:
      spec: the model's shape.
      params: with unstacked layers, in the dtype to compute in.
      tokenizer: text <-> tokens; a model with more tokens writes none of those that it lacks.
      stops: tokens that end a completion, beside the tokenizer's end of text.
      encode: a prompt's tokens; by default as documents begin in training, with the end-of-text token, or as an
        encoder's input ends, with the same; a prefix is the text alone.
      prefix: whether all of a prompt sees all of it, in a decoder that learned so.
      places: where arrays lie on a mesh; None for one device.
    """

    spec: ModelSpec
    params: Params
    tokenizer: TextTokenizer
    stops: tuple[int, ...] = ()
    encode: Callable[[str], list[int]] | None = None
    prefix: bool = False
    places: Places | None = None

    def stream(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        stop: Sequence[str] = (),
        pace: Pace = STEADY,
    ) -> Iterator[tuple[list[Row], list[str]]]:
        """Yields, as often as ``pace`` says, all rows and the text that each has gained.

        Raises:
          UserError: a prompt that does not fit the context with its completion, or tokenizes to nothing usable; an
            empty stop string.
        """
        if not prompts:
            raise UserError("there is no prompt to continue; give at least one")
        if isinstance(stop, str) or "" in stop:
            raise UserError(f"stop is {stop!r}, expected a list of strings of at least one character; or leave it out")
        encoded = [self.encode_prompt(p, i, max_new_tokens) for i, p in enumerate(prompts)]
        ends = frozenset([self.tokenizer.end_id, *self.stops])
        rows = [Row(TextStream(self.tokenizer), ends, tuple(stop), max_new_tokens) for _ in prompts]
        program, state = self._read(encoded, max_new_tokens, sampling, seeds, sorted(ends))
        count, left = pace.first, max_new_tokens
        while left:
            count, began = min(count, left), perf_counter()
            state, tokens, logprobs = decode_chunk(program, self.params, state, count, steps=pace.most)
            for row, new, scores in zip(rows, np.asarray(tokens), np.asarray(logprobs), strict=False):
                for token, score in zip(new.tolist(), scores.tolist(), strict=True):
                    row.push(token, score)
            left, count = left - count, pace.after(count, perf_counter() - began)
            yield rows, [row.news() for row in rows]
            if all(row.finish_reason for row in rows):
                return

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        seeds: Sequence[int],
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """The completions of ``prompts``, in their order."""
        sampling = sampling or Sampling()
        chunks = self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling, seeds=seeds, stop=stop)
        return completed(list(chunks)[-1][0])

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        ends: Sequence[int],
    ) -> tuple[Program, Decoding]:
        """The program that goes on, and its state after the prompts, which are repeated until the mesh divides them."""
        places = self.places
        more = 0 if places is None else -len(prompts) % places.rows
        prompts, seeds = [*prompts, *[prompts[-1]] * more], [*seeds, *[seeds[-1]] * more]
        numbers = np.array([seed & 0xFFFFFFFF for seed in seeds], np.uint32)
        inputs, source = decoder_inputs(self.spec, prompts, prefix=self.prefix)
        slots = slots_for(inputs, new_tokens)
        arrays = (inputs, source, numbers), (np.array(ends, np.int32), sampling.values())
        (inputs, source, numbers), (stops, values) = arrays if places is None else places.put(*arrays)
        reading, writing = (None, None) if places is None else (places.reading, places.writing)
        known = max(self.tokenizer.vocab_size, *(end + 1 for end in ends))
        program = Program(self.spec, sampling.filters, writing, known)
        state = prefill(
            replace(program, sharding=reading),
            self.params,
            inputs,
            keys(numbers),
            stops,
            values,
            slots=slots,
            source=source,
        )
        return program, state

    def encode_prompt(self, prompt: str, index: int, new: int) -> list[int]:
        """The tokens of prompt number ``index``; raises UserError if ``new`` more do not fit the context."""
        tokens = self.encode(prompt) if self.encode else self._as_trained(prompt)
        if new < 1:
            raise UserError(f"max_new_tokens is {new}, expected at least 1")
        # The encoder has the context for the prompt, and the decoder has it for the start token and the new ones.
        room = self.spec.context if self.spec.encoder else self.spec.context - new
        if len(tokens) > room or new >= self.spec.context:
            raise UserError(
                f"prompt {index} has {len(tokens)} tokens, which with {new} new ones exceeds the model's context of "
                f"{self.spec.context}; shorten it to {max(room, 0)} tokens or ask for fewer"
            )
        return tokens

    def _as_trained(self, prompt: str) -> list[int]:
        tokens, end = self.tokenizer.encode(prompt), self.tokenizer.end_id
        if self.prefix:
            return tokens or [end]
        return [end, *tokens] if self.spec.encoder is None else [*tokens, end]


@jax.jit
def keys(seeds: jax.Array) -> jax.Array:
    """A PRNG key for each of uint32 [batch]."""
    return jax.vmap(jax.random.key)(seeds)


def decoder_inputs(
    spec: ModelSpec, prompts: Sequence[Sequence[int]], *, prefix: bool = False
) -> tuple[Inputs, Inputs | None]:
    """What is decoded from: the prompts, which ``prefix`` makes see all of themselves; of an encoder-decoder the start
    token, and the prompts for its encoder."""
    padded = left_padded(prompts)
    if spec.encoder is None:
        return replace(padded, prefix=padded.segments > 0) if prefix else padded, None
    return Inputs.whole(jnp.full((len(prompts), 1), spec.encoder.decoder_start, jnp.int32)), padded


def completed(rows: Sequence[Row]) -> list[Completion]:
    """The finished rows as completions."""
    return [Completion(r.text, tuple(r.tokens), tuple(r.logprobs), r.finish_reason or "length") for r in rows]


def left_padded(prompts: Sequence[Sequence[int]]) -> Inputs:
    """Prompts as int32 [batch, length], padded on the left (segment 0) to a multiple of BUCKET."""
    length = _bucketed(max(len(p) for p in prompts))
    tokens, segments = (np.zeros((len(prompts), length), np.int32) for _ in range(2))
    for i, prompt in enumerate(prompts):
        tokens[i, length - len(prompt) :] = prompt
        segments[i, length - len(prompt) :] = 1
    positions = np.maximum(np.cumsum(segments, axis=1, dtype=np.int32) - 1, 0)
    return Inputs(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments))


def slots_for(inputs: Inputs, new_tokens: int) -> int:
    """Cache positions for padded prompts and their completions."""
    return _bucketed(inputs.tokens.shape[1] + new_tokens)


def _bucketed(length: int) -> int:
    return -(-length // BUCKET) * BUCKET
