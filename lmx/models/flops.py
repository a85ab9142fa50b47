"""Model FLOPs and parameter counts: what the computation needs, not what an implementation spends."""

import math
from typing import Any

import jax

from lmx.models.model import param_shapes
from lmx.models.specs import ModelSpec
from lmx.nn.attention import SelfAttention


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the model; the padding rows of the tables are not counted."""
    sizes = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(spec)))
    tables = 1 if spec.head is None else 2
    return sizes - tables * (spec.embedding.vocab - spec.vocab) * spec.width


def train_flops_per_token(spec: ModelSpec, length: int) -> float:
    """FLOPs to train on one token of a row of ``length`` (Chowdhery et al. 2022, appendix B).

    6 for each weight that multiplies it, the output table included and lookups not, and 12 * heads * head_dim *
    length for each layer's attention, the causal half not taken off.
    """
    return 3 * forward_flops_per_token(spec, length)


def forward_flops_per_token(spec: ModelSpec, length: int) -> float:
    """FLOPs of the forward pass for one token that attends to ``length`` positions."""
    kernels = sum(_kernel_size(path, leaf) for path, leaf in jax.tree.leaves_with_path(param_shapes(spec)["stack"]))
    attention = sum(
        2 * 2 * s.heads * s.head_dim * length
        for block in spec.stack.blocks()
        for s in block.sublayers
        if isinstance(s, SelfAttention)
    )
    return 2.0 * (kernels + spec.vocab * spec.width) + attention


def _kernel_size(path: Any, leaf: Any) -> int:
    return math.prod(leaf.shape) if path[-1].key == "kernel" else 0
