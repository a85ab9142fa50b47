"""Grouped matrix multiplication: each row times the kernel of its group, the rows sorted by group. One entry point.

Behind it, by the platform that a program is lowered for:

- CPU: a loop over the groups that have rows, in blocks of rows. ``jax.lax.ragged_dot`` is correct there but computes
  every row with every group's kernel. Milliseconds on two busy cores, float32, ``ragged_dot`` / this / one plain
  product of as many rows: 8 groups of 768 x 2048, 2 rows 104 / 1.7 / 1.6, 16 rows 126 / 15 / 2, 1,024 rows 885 / 161
  / 90; 64 groups of 512 x 768, 4 rows 203 / 0.7 / 0.3, 32 rows 221 / 5 / 0.4, 2,048 rows 4504 / 42 / 43. Gathering a
  kernel for each row is as fast for 2 to 4 rows and some 10 times slower for 16. In bfloat16 XLA:CPU converts all
  kernels to float32 in each call, which costs more than the products of a few rows.
- TPU: the grouped matmul that JAX ships (megablox, after Gale et al. 2022). XLA:TPU compiles ``ragged_dot`` to a masked
  dense product: by its own cost analysis, groups times the operations. The compiler cannot partition a Pallas kernel:
  on a mesh, the operands are one device's, inside a region (see :mod:`lmx.nn.expert_parallel`).
- else ``jax.lax.ragged_dot``.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

TILE = 128
"""Rows, at least, that megablox takes at a time."""


def grouped_matmul(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """``out[r] = x[r] @ kernels[g]`` for the rows r of group g; differentiable in ``x`` and ``kernels``.

    Args:
      x: [rows, in], sorted by group: the first ``sizes[0]`` rows are group 0's, and so on.
      kernels: [groups, in, out], of the same dtype.
      sizes: int32 [groups]; their sum is at most ``rows``.

    Returns:
      [rows, out] in the dtype of ``x``. Rows that belong to no group hold anything at all, and so does their gradient:
      the caller must not read them. They have no part in the gradient of ``kernels``.
    """
    chosen = jax.lax.platform_dependent(x, kernels, sizes, cpu=looped, tpu=megablox, default=jax.lax.ragged_dot)
    return cast(jax.Array, chosen)


def megablox(x: jax.Array, kernels: jax.Array, sizes: jax.Array, interpret: bool = False) -> jax.Array:
    """:func:`grouped_matmul` by JAX's Pallas kernel for TPUs; ``interpret`` runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    rows, groups = x.shape[0], kernels.shape[0]
    # Each tile of rows reads a whole kernel: larger ones are for groups that fill them.
    tile = 4 * TILE if rows >= 4 * TILE * groups else TILE
    padded = jnp.pad(x, ((0, -rows % tile), (0, 0)))
    return gmm(padded, kernels, sizes, x.dtype, (tile, 4 * TILE, 4 * TILE), None, None, False, interpret)[:rows]


@jax.custom_vjp
def looped(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """:func:`grouped_matmul` by a loop over the groups that have rows."""
    return _products(x, kernels, sizes, kernel_axis=0)


def _forward(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> Any:
    return looped(x, kernels, sizes), (x, kernels, sizes)


def _backward(residuals: Any, d_out: jax.Array) -> Any:
    x, kernels, sizes = residuals
    return _products(d_out, kernels, sizes, kernel_axis=1), _kernel_gradient(x, kernels, sizes, d_out), None


looped.defvjp(_forward, _backward)


def _products(x: jax.Array, kernels: jax.Array, sizes: jax.Array, kernel_axis: int) -> jax.Array:
    """Each row times its group's kernel, contracted over the kernel's axis 0 (in) or 1 (out)."""
    rows, groups = x.shape[0], kernels.shape[0]
    block = _block(rows, groups)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def of_group(group: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
        kernel = kernels[group]

        def product(start: jax.Array, out: jax.Array) -> jax.Array:
            # A block may reach into the next groups' rows, which are written after it.
            part = jax.lax.dynamic_slice_in_dim(padded, start, block)
            y = jax.lax.dot_general(part, kernel, (((1,), (kernel_axis,)), ((), ())))
            return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

        return product

    start = jnp.zeros((rows + block, kernels.shape[2 - kernel_axis]), x.dtype)
    return _over_blocks(sizes, block, of_group, start)[:rows]


def _kernel_gradient(x: jax.Array, kernels: jax.Array, sizes: jax.Array, d_out: jax.Array) -> jax.Array:
    """[groups, in, out]: the sum over each group's rows of the outer products, accumulated in float32."""
    block = _block(x.shape[0], kernels.shape[0])
    padded, d_padded = (jnp.pad(a, ((0, block), (0, 0))) for a in (x, d_out))
    ends = jnp.cumsum(sizes)

    def of_group(group: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def product(start: jax.Array, total: jax.Array) -> jax.Array:
            own = (start + jnp.arange(block) < ends[group])[:, None]
            part = jnp.where(own, jax.lax.dynamic_slice_in_dim(padded, start, block), 0)
            d_part = jnp.where(own, jax.lax.dynamic_slice_in_dim(d_padded, start, block), 0)
            return total.at[group].add(jnp.einsum("ri,ro->io", part, d_part, preferred_element_type=jnp.float32))

        return product

    return _over_blocks(sizes, block, of_group, jnp.zeros(kernels.shape, jnp.float32)).astype(kernels.dtype)


def _block(rows: int, groups: int) -> int:
    """Rows of a block: about a group's share, so that few are wasted, but no more than a product needs to be fast."""
    return min(32, max(4, 1 << (rows // groups).bit_length()))


def _over_blocks(sizes: jax.Array, block: int, of_group: Callable[..., Any], carry: jax.Array) -> jax.Array:
    """``carry = of_group(group)(start, carry)`` for each block of rows of each group that has rows, in their order."""
    starts = jnp.cumsum(sizes) - sizes
    order = jnp.argsort(sizes == 0, stable=True)

    def group_step(i: jax.Array, carry: jax.Array) -> jax.Array:
        group = order[i]
        step = of_group(group)
        blocks = -(-sizes[group] // block)
        return jax.lax.fori_loop(0, blocks, lambda b, c: step(starts[group] + b * block, c), carry)

    return cast(jax.Array, jax.lax.fori_loop(0, (sizes > 0).sum(), group_step, carry))
