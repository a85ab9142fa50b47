"""Copying, converting and comparing large arrays: in pieces, so that neither time nor memory go to whole copies."""

import jax.numpy as jnp
import numpy as np

STRIP = 16
"""Columns that are transposed at a time, so that what they touch stays in the processor's cache."""
CHUNK = 1 << 18
"""Bytes that are looked at at a time, for the same reason."""


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies and converts ``source`` into ``target``."""
    if target.dtype == source.dtype:  # NumPy moves bytes faster than numbers that it does not know (bfloat16)
        target, source = _bits(target), _bits(source)
    if target.ndim and source.strides[-1] != source.itemsize:  # transposed: four times as fast in strips
        for i in range(0, target.shape[-1], STRIP):
            target[..., i : i + STRIP] = source[..., i : i + STRIP]
    else:
        target[...] = source


def contiguous(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in a dtype and in C order: itself if it is so already."""
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    result = np.empty(array.shape, dtype)
    copy(result, array)
    return result


def finite(array: np.ndarray) -> bool:
    """Whether a contiguous array has no NaN and no infinity, whose exponents are all ones."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    bits, exponent, step = _bits(array).reshape(-1), _bits(np.array(np.inf, array.dtype)), CHUNK // array.itemsize
    pieces = (bits[i : i + step] for i in range(0, bits.size, step))
    return not any(((piece & exponent) == exponent).any() for piece in pieces)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two contiguous arrays have the same bytes, NaN and the sign of zero included."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    a, b = (array.reshape(-1).view(np.uint8) for array in (one, other))
    return all(np.array_equal(a[i : i + CHUNK], b[i : i + CHUNK]) for i in range(0, a.size, CHUNK))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")
