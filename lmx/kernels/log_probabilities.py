"""The log-probability of each target, in chunks: for losses that are no sums over tokens."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lmx.kernels.cross_entropy import ROWS, Readout, chunk_count, chunks_of, readout_logits, unchunked


def log_probabilities(readout: Readout, targets: jax.Array) -> jax.Array:
    """Float32 [batch, length]: ``l[target] - logsumexp(l)`` of the readout's logits ``l``.

    A chunk's logits are computed again in the backward pass, so that those of the whole batch never exist at once.

    Args:
      readout: what predicts.
      targets: int32 [batch, length].
    """
    # As float32 here and in its own dtype inside: the gradient is then summed over the chunks in float32.
    table = readout.table.astype(jnp.float32)

    @jax.checkpoint
    def of_chunk(table: jax.Array, bias: Any, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        own = replace(readout, hidden=hidden, table=table.astype(readout.table.dtype), bias=bias)
        logits = readout_logits(own, ROWS)
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return target - jax.nn.logsumexp(logits, axis=-1)

    count = chunk_count(*targets.shape)
    chunks = tuple(chunks_of(a, count) for a in (readout.hidden, targets))
    found = jax.lax.scan(lambda _, chunk: (None, of_chunk(table, readout.bias, *chunk)), None, chunks)[1]
    return unchunked(found)
