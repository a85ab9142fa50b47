"""Rows that change places: gathers whose transpose is a gather too, where JAX would scatter."""

from typing import Any

import jax


@jax.custom_vjp
def move(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
    """``out[i] = x[there[i]]``, 0 where the index is past the end; ``back`` is the inverse, so that both ways gather.

    Args:
      x: [n, embed].
      there: int32 [m], each row at most once, n for none.
      back: int32 [n]: where each row of ``x`` went, m for nowhere.
    """
    return x.at[there].get(mode="fill", fill_value=0)


def _forward(x: jax.Array, there: jax.Array, back: jax.Array) -> Any:
    return move(x, there, back), back


def _backward(back: jax.Array, d_out: jax.Array) -> Any:
    return d_out.at[back].get(mode="fill", fill_value=0), None, None


move.defvjp(_forward, _backward)
