"""Optimizers from Optax, as configurations: each builds a transformation of gradients into unscaled updates.

The learning rate is applied by the train step, so that the one it logs is the one it used. AdamW is here, the others
are in :mod:`lmx.optim.catalogue`.
"""

import abc
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from lmx.config import BELOW_ONE, NOT_NEGATIVE, POSITIVE, Within
from lmx.errors import UserError
from lmx.nn.module import Params
from lmx.optim.names import check_patterns, matches, name_of
from lmx.optim.placement import owners

MomentDtype = Literal["float32", "bfloat16"]
COARSE = 2.0**-6
"""Averages of which a step replaces less than this part stay float32: bfloat16 numbers are 2**-8 apart, relatively, and
what changes by less than half of that does not change at all. With b2 = 0.999 a second moment could only rise."""


@dataclass(frozen=True)
class Optimizer(abc.ABC):
    """Base class of the optimizers' configurations."""

    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.1
    """Decoupled weight decay, scaled by the learning rate."""
    no_decay: tuple[str, ...] = (
        "*bias",
        "*norm*scale",
        "*embedding/position",
        "*sinks",
        "*correction",
        "*shared/relative/*",
        "*kernel/magnitude",
    )
    """Parameters without decay: patterns of their names, as in stack/segment_0/block_0/mlp/up/kernel."""
    clip_norm: Annotated[float, NOT_NEGATIVE] = 1.0
    """The gradient is scaled down to this global norm; 0 never does."""
    moments: MomentDtype = "float32"
    """How the optimizer's moments are stored; they are updated in float32. With b2 above 0.984 the second moment stays
    float32: its steps are too small for bfloat16."""
    layer_decay: Annotated[float, Within(0, 1, above=True)] = 1.0
    """Learning rates fall by this factor from layer to layer, from the heads down to the embeddings; 1: all equal."""
    rates: tuple[tuple[str, float], ...] = ()
    """Patterns of names, each with a factor of the learning rate; of several that fit, all factors count."""
    frozen: tuple[str, ...] = ()
    """Patterns of the names of parameters that are not trained: they have no gradient, no moments, and stay as they
    are."""

    @property
    def exact(self) -> tuple[str, ...]:
        """Parts of the state that stay float32: averages over so many steps that each changes less than bfloat16 tells.

        Rounding at random would keep them right on average in bfloat16, but off by some percent, and take a random
        number for each parameter in every step.
        """
        return ()

    @abc.abstractmethod
    def scaling(self, axes: Params) -> optax.GradientTransformation:
        """Gradients -> steps of unit scale, before decay and learning rate.

        ``axes`` are the logical axes of the parameters that are trained.
        """

    def build(self, axes: Params) -> optax.GradientTransformationExtraArgs:
        """Clipped gradients -> updates to be multiplied by minus the learning rate."""
        scaling = optax.with_extra_args_support(self.scaling(axes))
        if self.moments != "float32":
            scaling = stored_as(scaling, jnp.dtype(self.moments), self.exact)
        return optax.chain(scaling, optax.add_decayed_weights(self.weight_decay, mask=self.decayed))

    def decayed(self, params: Any) -> Any:
        """A tree like ``params`` of bool: whether weight decay applies."""
        return jax.tree.map_with_path(lambda path, _: not matches(name_of(path), self.no_decay), params)

    def check(self, known: list[str]) -> None:
        """Raises UserError for negative factors and for patterns that fit none of the ``known`` names."""
        for pattern, factor in self.rates:
            if factor < 0:
                raise UserError(f"optimizer.rates has the factor {factor} for {pattern!r}, expected at least 0")
        check_patterns("optimizer.rates", [pattern for pattern, _ in self.rates], known)
        check_patterns("optimizer.frozen", self.frozen, known)

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name is trained."""
        return not matches(name, self.frozen)


@dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019)."""

    b1: Annotated[float, BELOW_ONE] = 0.9
    """Decay of the first moment."""
    b2: Annotated[float, BELOW_ONE] = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, POSITIVE] = 1e-8
    """Added to the root of the second moment."""

    @property
    def exact(self) -> tuple[str, ...]:
        """A slow second moment."""
        return slow(nu=self.b2)

    def scaling(self, axes: Params) -> optax.GradientTransformation:
        """Gradients -> first moment / root of the second moment, both bias-corrected."""
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


def slow(**decays: float) -> tuple[str, ...]:
    """The names of the averages whose decay is too near to 1 for bfloat16."""
    return tuple(name for name, decay in decays.items() if 1 - decay < COARSE)


def stored_as(
    inner: optax.GradientTransformationExtraArgs, dtype: Any, exact: tuple[str, ...] = ()
) -> optax.GradientTransformationExtraArgs:
    """``inner`` with its moments stored in ``dtype`` between steps and updated in float32.

    What belongs to no parameter stays as it is, and so do the parts of the state named in ``exact``.
    """

    def cast(state: Any, params: Any, to: Any) -> Any:
        leaves = [
            leaf
            if owner is None or set(name) & set(exact) or not jnp.issubdtype(leaf.dtype, jnp.floating)
            else leaf.astype(to)
            for name, owner, leaf in owners(state, params)
        ]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def init(params: Any) -> Any:
        return cast(inner.init(params), params, dtype)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        like = updates if params is None else params
        updates, state = inner.update(updates, cast(state, like, jnp.float32), params, **extra)
        return updates, cast(state, like, dtype)

    return optax.GradientTransformationExtraArgs(init, update)
