"""Measures decoding: prefill, and single-token steps beside what the device's memory delivers."""

import math
import statistics
import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lmx.decode.generate import decoder_inputs, keys, slots_for
from lmx.decode.loop import Program, decode_chunk, prefill
from lmx.decode.places import Places
from lmx.decode.sampling import Sampling
from lmx.errors import UserError
from lmx.kernels.roofline import memory_bytes_per_second, peak_memory_bytes
from lmx.models.specs import ModelSpec
from lmx.nn.module import Params


def bench_decode(
    spec: ModelSpec,
    params: Params,
    *,
    batch: int,
    prompt_length: int,
    new_tokens: int,
    repeats: int,
    places: Places | None = None,
) -> dict[str, Any]:
    """Greedy decoding of random prompts, ``repeats`` times after one that compiles; medians, times in seconds.

    ``params`` are unstacked, on a mesh as ``places`` say.

    ``tokens_per_second`` counts the new tokens of all rows over the whole call, prefill included.
    ``fraction_of_peak`` is the bytes of weights and cache that a step must read, over those that a sum over a large
    array reads in the same process.
    """
    _check(spec, batch, prompt_length, new_tokens, repeats)
    if places is not None:
        places.check_batch(batch)
    prompts = np.random.default_rng(0).integers(1, spec.vocab, (batch, prompt_length)).tolist()
    (inputs, source), sampling = decoder_inputs(spec, prompts), Sampling(temperature=0)
    reading, writing = (None, None) if places is None else (places.reading, places.writing)
    program, slots = Program(spec, sampling.filters, writing), slots_for(inputs, new_tokens)
    arrays = (inputs, source, np.arange(batch, dtype=np.uint32)), (np.array([-1], np.int32), sampling.values())
    (inputs, source, numbers), (never, values) = arrays if places is None else places.put(*arrays)
    seeds, read, runs = keys(numbers), replace(program, sharding=reading), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state = prefill(read, params, inputs, seeds, never, values, slots=slots, source=source)
        jax.block_until_ready(state.token)
        filled = time.perf_counter()
        state, tokens, _ = decode_chunk(program, params, state, new_tokens, steps=new_tokens)
        jax.block_until_ready(tokens)
        runs.append((filled - began, time.perf_counter() - filled))
    prefill_seconds = statistics.median(r[0] for r in runs[1:])
    step_seconds = statistics.median(r[1] for r in runs[1:]) / new_tokens
    bandwidth = memory_bytes_per_second()
    return {
        "tokens_per_second": batch * new_tokens / (prefill_seconds + step_seconds * new_tokens),
        "step_seconds": step_seconds,
        "prefill_seconds": prefill_seconds,
        "compile_seconds": sum(runs[0]) - prefill_seconds - step_seconds * new_tokens,
        "peak_memory_bytes": peak_memory_bytes(),
        "memory_bytes_per_second": bandwidth,
        "fraction_of_peak": _bytes_read(params, state.cache.layers) / step_seconds / bandwidth,
        "devices": 1 if writing is None else writing.mesh.size,
        "batch": batch,
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "dtype": str(params["embedding"]["table"].dtype),
        "device": jax.devices()[0].device_kind,
    }


def _check(spec: ModelSpec, batch: int, prompt_length: int, new_tokens: int, repeats: int) -> None:
    if min(batch, prompt_length, new_tokens, repeats) < 1 or prompt_length + new_tokens > spec.context:
        raise UserError(
            f"batch {batch}, prompt length {prompt_length}, new tokens {new_tokens}, repeats {repeats}: each is at "
            f"least 1, and a prompt with its new tokens fits the model's context of {spec.context}"
        )


def _bytes_read(params: Params, cache: Any) -> int:
    """What a step reads on each device: every weight of the decoder but the positions' table, and the cache."""
    table = params.get("head", {}).get("table", params["embedding"]["table"])
    arrays = jax.tree.leaves([params["stack"], table, cache])
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)
