"""Optimizers from Optax, as configurations: each builds a transformation of gradients into unscaled updates.

The learning rate is applied by the train step, so that the one it logs is the one it used.
"""

import abc
import fnmatch
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

MomentDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Optimizer(abc.ABC):
    """Base class of the optimizers' configurations."""

    weight_decay: float = 0.1
    """Decoupled weight decay, scaled by the learning rate."""
    no_decay: tuple[str, ...] = (
        "*bias",
        "*norm*scale",
        "*embedding/position",
        "*sinks",
        "*correction",
        "*shared/relative/*",
    )
    """Parameters without decay: patterns of their names, as in stack/segment_0/block_0/mlp/up/kernel."""
    clip_norm: float = 1.0
    """The gradient is scaled down to this global norm; 0 never does."""
    moments: MomentDtype = "float32"
    """How the optimizer's moments are stored; they are updated in float32."""

    @abc.abstractmethod
    def scaling(self) -> optax.GradientTransformation:
        """Gradients -> steps of unit scale, before decay and learning rate."""

    def build(self) -> optax.GradientTransformation:
        """Clipped gradients -> updates to be multiplied by minus the learning rate."""
        scaling = self.scaling()
        if self.moments != "float32":
            scaling = stored_as(scaling, jnp.dtype(self.moments))
        return optax.chain(scaling, optax.add_decayed_weights(self.weight_decay, mask=self.decayed))

    def decayed(self, params: Any) -> Any:
        """A tree like ``params`` of bool: whether weight decay applies."""

        def decays(path: Any, _: Any) -> bool:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.no_decay)

        return jax.tree.map_with_path(decays, params)


@dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019)."""

    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def scaling(self) -> optax.GradientTransformation:
        """Gradients -> first moment / root of the second moment, both bias-corrected."""
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


def stored_as(inner: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformation:
    """``inner`` with its floating-point state stored in ``dtype`` between steps and updated in float32."""

    def cast(tree: Any, to: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(to) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)
