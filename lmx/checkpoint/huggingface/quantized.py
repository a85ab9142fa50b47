"""Checkpoints that ship quantized, seen as bfloat16: each tensor is dequantized when it is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import ml_dtypes
import numpy as np

from lmx.checkpoint.huggingface.tensors import Tensors
from lmx.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The sixteen numbers of 4 bits: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, 5.3.3).
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def dequantized(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """The tensors as the model has them: bfloat16 where they are stored in blocks of fp8 or as MXFP4.

    Args:
      tensors: the checkpoint's.
      config: the content of ``config.json``, which says under ``quantization_config`` how they are quantized.

    Raises:
      UserError: a way to quantize other than those two.
    """
    how = config.get("quantization_config")
    if not how:
        return tensors
    method, block = how.get("quant_method"), how.get("weight_block_size")
    if method == "mxfp4":
        return Mxfp4(tensors)
    if method == "fp8" and block:
        return BlockFp8(tensors, (int(block[0]), int(block[1])))
    raise UserError(
        f"the checkpoint is quantized with {method!r} (weight_block_size {block}), but only blocks of 'fp8' and "
        "'mxfp4' are read; take the unquantized checkpoint"
    )


@dataclass(frozen=True)
class BlockFp8:
    """A matrix ``X`` [out, in] in 8 bits, with a factor for each block in ``X_scale_inv`` (DeepSeek-V3, 3.3.2).

    Attributes:
      tensors: the checkpoint's.
      block: rows and columns that share a factor.
    """

    tensors: Tensors
    block: tuple[int, int]

    SUFFIX: ClassVar[str] = "_scale_inv"

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.tensors if not name.endswith(self.SUFFIX))

    def __contains__(self, name: object) -> bool:
        return name in self.tensors and not str(name).endswith(self.SUFFIX)

    def info(self, name: str) -> jax.ShapeDtypeStruct:
        """A tensor's shape and dtype. Raises UserError if its factors are not one for each block."""
        info = self.tensors.info(name)
        if name + self.SUFFIX not in self.tensors:
            return info
        shape = self.tensors.info(name + self.SUFFIX).shape
        expected = tuple(-(-n // b) for n, b in zip(info.shape, self.block, strict=True))
        if shape != expected:
            raise UserError(f"{name}{self.SUFFIX} has the shape {shape}, expected {expected}: one for each block")
        return jax.ShapeDtypeStruct(info.shape, BFLOAT16)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or a range of its rows."""
        quantized = self.tensors.read(name, rows)
        if name + self.SUFFIX not in self.tensors:
            return quantized
        height, width = self.block
        scales = self.tensors.read(name + self.SUFFIX).astype(np.float32)
        first = rows.indices(self.tensors.info(name).shape[0])[0]
        result = np.empty(quantized.shape, BFLOAT16)
        for i, row in enumerate(scales):
            here = slice(max(i * height - first, 0), max((i + 1) * height - first, 0))
            factors = np.repeat(row, width)[: quantized.shape[1]]
            result[here] = quantized[here].astype(np.float32) * factors
        return result


@dataclass(frozen=True)
class Mxfp4:
    """Experts ``X`` [expert, in, out] in 4 bits, 32 along the inputs sharing a power of two (GPT-OSS).

    They are stored by outputs: ``X_blocks`` [expert, out, in / 32, 16], the first number of a byte in its low half,
    and ``X_scales`` [expert, out, in / 32], exponents with 127 added.
    """

    tensors: Tensors

    BLOCKS: ClassVar[str] = "_blocks"
    SCALES: ClassVar[str] = "_scales"

    def __iter__(self) -> Iterator[str]:
        for name in self.tensors:
            if not (name.endswith(self.SCALES) and self._packed(name.removesuffix(self.SCALES))):
                yield name.removesuffix(self.BLOCKS)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors or self._packed(str(name))

    def _packed(self, name: str) -> bool:
        return name + self.BLOCKS in self.tensors

    def info(self, name: str) -> jax.ShapeDtypeStruct:
        """A tensor's shape and dtype. Raises UserError if its exponents are not one for each block."""
        if not self._packed(name):
            return self.tensors.info(name)
        if name + self.SCALES not in self.tensors:
            raise UserError(f"the checkpoint has {name}{self.BLOCKS} but lacks {name}{self.SCALES}; download it again")
        blocks, scales = (self.tensors.info(name + suffix).shape for suffix in (self.BLOCKS, self.SCALES))
        if blocks[:-1] != scales:
            raise UserError(f"{name}{self.SCALES} has the shape {scales}, expected {blocks[:-1]}: one for each block")
        experts, out, groups, size = blocks
        return jax.ShapeDtypeStruct((experts, groups * size * 2, out), BFLOAT16)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or some of its experts."""
        if not self._packed(name):
            return self.tensors.read(name, rows)
        blocks, scales = (self.tensors.read(name + suffix, rows) for suffix in (self.BLOCKS, self.SCALES))
        _, inputs, outputs = self.info(name).shape
        result = np.empty((len(blocks), inputs, outputs), BFLOAT16)
        for expert, (block, scale) in enumerate(zip(blocks, scales, strict=True)):
            values = FP4[np.stack([block & 15, block >> 4], axis=-1)].reshape(*scale.shape, -1)
            values = np.ldexp(values, scale[..., None].astype(np.int32) - 127)
            result[expert] = values.reshape(outputs, inputs).T
        return result
