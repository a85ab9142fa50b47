"""Factors of the learning rate by layer and by name."""

from typing import Any

import jax
import numpy as np

from lmx.models.specs import ModelSpec, StackSpec
from lmx.nn.module import Params
from lmx.optim.names import is_axes, matches, name_of
from lmx.optim.optimizer import Optimizer


def rate_factors(optimizer: Optimizer, spec: ModelSpec, axes: Params) -> Any:
    """What the learning rate is multiplied by for each parameter: a tree like ``axes`` of floats, or for stacked
    parameters with a decay by layer float32 [layers, 1, ...].

    With ``layer_decay`` d and a stack of n layers: 1 for the heads and norms after the stack, d ** (n - l) for layer l
    (from 0), d ** (n + 1) for embeddings and for what a stack's layers share (Clark et al. 2020, ELECTRA). An encoder
    and a decoder each count their own layers.
    """

    def one(path: Any, own: tuple[Any, ...]) -> Any:
        name = name_of(path)
        by_name = float(np.prod([factor for pattern, factor in optimizer.rates if matches(name, [pattern])]))
        return by_name if optimizer.layer_decay == 1 else by_name * _by_layer(optimizer.layer_decay, spec, name, own)

    return jax.tree.map_with_path(one, axes, is_leaf=is_axes)


def _by_layer(decay: float, spec: ModelSpec, name: str, axes: tuple[Any, ...]) -> Any:
    in_encoder = name.startswith("encoder/") and spec.encoder is not None
    stack = spec.encoder.stack if in_encoder and spec.encoder else spec.stack
    inside, layers = name.removeprefix("encoder/").split("/"), len(stack.blocks())
    if inside[0] == "stack" and inside[1].startswith("segment_"):
        depth = layers - _layers(stack, int(inside[1].removeprefix("segment_")), int(inside[2].removeprefix("block_")))
        return np.float32(decay**depth).reshape(-1, *(1 for _ in axes[1:]))
    return decay ** (layers + 1) if inside[0] in ("embedding", "stack") else 1.0


def _layers(stack: StackSpec, segment: int, block: int) -> np.ndarray:
    """The layers' numbers (from 0) along the leading axis of a segment's block."""
    before = sum(s.repeats * len(s.pattern) for s in stack.segments[:segment])
    here = stack.segments[segment]
    return before + block + len(here.pattern) * np.arange(here.repeats)
