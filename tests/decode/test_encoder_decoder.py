"""Decoding of encoder-decoders: the compiled loop against the full forward pass, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import load_golden

from lmx.decode.generate import decoder_inputs
from lmx.decode.loop import Program, decode_chunk, prefill
from lmx.decode.sampling import Sampling
from lmx.models.model import Inputs, apply, logits
from tests.jitted import encode, unstack_layers

NEW = 7


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "transformer"])
def test_greedy_tokens_are_those_of_the_full_forward(name):
    golden = load_golden(name)
    spec, params = golden.spec, golden.params
    prompts = [row[seen > 0].tolist() for row, seen in zip(golden.tokens, golden.arrays["segments"], strict=True)]
    inputs, source = decoder_inputs(spec, prompts)
    assert source is not None
    sampling, never = Sampling(temperature=0), jnp.array([-1], jnp.int32)
    program, keys = Program(spec, sampling.filters), jax.random.split(jax.random.key(0), len(prompts))
    ready = unstack_layers(spec, params)
    state = prefill(program, ready, inputs, keys, never, sampling.values(), slots=1 + NEW, source=source)
    _, tokens, _ = decode_chunk(program, ready, state, NEW, steps=NEW)
    forward = jax.jit(lambda p, memory, read: logits(spec, p, apply(spec, p, read, memory=memory).hidden))
    for prompt, got in zip(prompts, np.asarray(tokens), strict=True):
        memory = encode(spec, params, Inputs.whole(jnp.asarray([prompt])))[0]  # no padding at all
        read = np.concatenate([[spec.encoder.decoder_start], got])
        scores = np.asarray(forward(params, memory, Inputs.whole(jnp.asarray(read[None, :-1]))))
        np.testing.assert_array_equal(got, scores[0].argmax(-1))
