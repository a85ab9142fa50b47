"""The optimizers beside AdamW."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lmx.config import BELOW_ONE, BETWEEN, COUNT, NOT_NEGATIVE, POSITIVE, Within
from lmx.errors import UserError
from lmx.nn.module import Params
from lmx.optim.matrices import Matrix, matrix_of
from lmx.optim.names import is_axes, name_of
from lmx.optim.optimizer import AdamW, Optimizer, slow


@dataclass(frozen=True)
class Sgd(Optimizer):
    """Stochastic gradient descent with momentum (Polyak 1964; Nesterov's form: Sutskever et al. 2013)."""

    momentum: Annotated[float, BELOW_ONE] = 0.9
    """Share of the last step that the next one keeps."""
    nesterov: bool = False
    """Whether the gradient is taken one momentum step ahead."""

    def scaling(self, axes: Params) -> optax.GradientTransformation:
        """Gradients -> their sum, each weighted by momentum to the power of its age."""
        return optax.trace(self.momentum, self.nesterov)


@dataclass(frozen=True)
class Lion(Optimizer):
    """Lion (Chen et al. 2023): the sign of an average, with one moment only.

    Its steps are larger than AdamW's: learning rates of a third to a tenth, and as much more decay, are usual.
    """

    b1: Annotated[float, BELOW_ONE] = 0.9
    """How much of the moment is in the step, the rest being the gradient."""
    b2: Annotated[float, BELOW_ONE] = 0.99
    """Decay of the moment."""

    def scaling(self, axes: Params) -> optax.GradientTransformation:
        """Gradients -> signs."""
        return optax.scale_by_lion(self.b1, self.b2)


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern 2018): second moments of a matrix as those of its rows and columns.

    Of a stacked parameter the two longest axes are factored; clipping and parameter scale go over all of its layers.
    """

    decay: Annotated[float, Within(0, 1, above=True)] = 0.8
    """The second moments' decay is 1 - step ** -decay (section 7.2)."""
    clip: Annotated[float, POSITIVE] = 1.0
    """The largest root mean square of a parameter's step (section 6)."""
    by_scale: bool = True
    """Steps relative to a parameter's root mean square, at least 1e-3 (section 8): learning rates near 1e-2."""
    factored_from: Annotated[int, COUNT] = 128
    """Parameters whose second longest axis is shorter keep whole second moments."""

    def scaling(self, axes: Params) -> optax.GradientTransformation:
        """Gradients -> gradients over the root of their factored second moments, clipped, scaled."""
        scaled = [optax.scale_by_param_block_rms()] if self.by_scale else []
        factored = optax.scale_by_factored_rms(
            decay_rate=self.decay, min_dim_size_to_factor=self.factored_from, epsilon=1e-30
        )
        return optax.chain(factored, optax.clip_by_block_rms(self.clip), *scaled)

    def check(self, known: list[str]) -> None:
        """See :class:`Optimizer`; its moments are float32."""
        super().check(known)
        if self.moments != "float32":
            raise UserError(
                f"optimizer.moments is {self.moments}, but Adafactor's second moments soon change by less than "
                "bfloat16 tells; set it to float32 (they are small)"
            )


@dataclass(frozen=True)
class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the hidden matrices of the stacks, AdamW for all else.

    A hidden matrix is known by its logical axes (:func:`lmx.optim.matrices.matrix_of`): each layer and each expert has
    its own, and heads are one side of it. Embeddings, heads, norms, biases and routers are AdamW's, with its numbers;
    ``eps`` is also added to the norm that a matrix is divided by.
    """

    momentum: Annotated[float, BELOW_ONE] = 0.95
    """Decay of the gradient's average that is orthogonalised, in Nesterov's form."""
    iterations: Annotated[int, COUNT] = 5
    """Newton-Schulz iterations."""
    rms: Annotated[float, POSITIVE] = 0.2
    """Root mean square of a matrix's step: AdamW's own, so that both share a learning rate (Liu et al. 2025, 2.2)."""

    def scaling(self, axes: Params) -> optax.GradientTransformation:
        """Matrices -> rms * sqrt(longer side) * orthogonalised average; others as AdamW."""
        own = matrices(axes)

        def numbers(updates: Any) -> Any:
            return jax.tree.map_with_path(lambda path, _: _dimensions(own[name_of(path)]), updates)

        def sized(updates: Any, params: Any = None) -> Any:
            return jax.tree.map_with_path(lambda path, u: self.rms * _longer(u, own[name_of(path)]) ** 0.5 * u, updates)

        muon = contrib.scale_by_muon(
            ns_steps=self.iterations, beta=self.momentum, eps=self.eps, weight_dimension_numbers=numbers
        )
        of_matrices = optax.chain(muon, optax.stateless(sized))
        others = optax.scale_by_adam(self.b1, self.b2, self.eps)
        label = lambda path, _: "matrices" if name_of(path) in own else "others"  # noqa: E731
        labels = jax.tree.map_with_path(label, axes, is_leaf=is_axes)
        return optax.partition({"matrices": of_matrices, "others": others}, labels)


def matrices(axes: Params) -> dict[str, Matrix]:
    """The hidden matrices among parameters, by name."""
    leaves = jax.tree.leaves_with_path(axes, is_leaf=is_axes)
    found = {name_of(path): matrix_of(name_of(path), own) for path, own in leaves}
    return {name: matrix for name, matrix in found.items() if matrix is not None}


def _dimensions(matrix: Matrix) -> contrib.MuonDimensionNumbers:
    return contrib.MuonDimensionNumbers(matrix.input_axes, matrix.output_axes)


def _longer(update: jax.Array, matrix: Matrix) -> int:
    """The longer side of a parameter's matrices."""
    return max(math.prod(update.shape[i] for i in side) for side in (matrix.input_axes, matrix.output_axes))


@dataclass(frozen=True)
class Sophia(Optimizer):
    """Sophia-H (Liu et al. 2023): the first moment over Hutchinson's estimate of the Hessian's diagonal, clipped.

    Every ``interval`` steps a product with the Hessian is taken (over the first microbatch), which costs about two
    gradients and their memory.
    """

    b1: Annotated[float, BELOW_ONE] = 0.965
    """Decay of the first moment."""
    b2: Annotated[float, BELOW_ONE] = 0.99
    """Decay of the Hessian's average."""
    gamma: Annotated[float, POSITIVE] = 0.01
    """The Hessian's diagonal is multiplied by this: more of it clips less."""
    eps: Annotated[float, POSITIVE] = 1e-12
    """The least that the moment is divided by."""
    interval: Annotated[int, COUNT] = 10
    """Steps between estimates."""

    @property
    def exact(self) -> tuple[str, ...]:
        """The Hessian's average, which moves once in some steps."""
        return ("nu",)

    def scaling(self, axes: Params) -> optax.GradientTransformation:
        """Gradients -> clip(moment / max(gamma * hessian, eps), -1, 1); takes the loss as ``obj_fn``."""
        # The rate of -1 undoes the sign that Optax gives its updates.
        return contrib.sophia(
            -1.0, self.b1, self.b2, self.eps, weight_decay=0.0, gamma=self.gamma, update_interval=self.interval
        )


@dataclass(frozen=True)
class AdEMAMix(Optimizer):
    """AdEMAMix (Pagliardini et al. 2024): AdamW with a second, slow average of the gradients."""

    b1: Annotated[float, BETWEEN] = 0.9
    """Decay of the fast average."""
    b2: Annotated[float, BELOW_ONE] = 0.999
    """Decay of the second moment."""
    b3: Annotated[float, BETWEEN] = 0.9999
    """Decay of the slow average; 0.999 for runs of a few thousand steps."""
    alpha: Annotated[float, NOT_NEGATIVE] = 8.0
    """Weight of the slow average."""
    warmup: Annotated[int, NOT_NEGATIVE] = 0
    """Steps over which alpha and b3 rise (section 3); the paper takes all of the run's."""
    eps: Annotated[float, POSITIVE] = 1e-8
    """Added to the root of the second moment."""

    @property
    def exact(self) -> tuple[str, ...]:
        """The slow average, and a slow second moment."""
        return "m2", *slow(nu=self.b2)

    def scaling(self, axes: Params) -> optax.GradientTransformation:
        """Gradients -> (fast + alpha * slow) / root of the second moment."""
        return contrib.scale_by_ademamix(self.b1, self.b2, self._b3, self._alpha, self.eps)

    def _alpha(self, count: jax.Array) -> jax.Array:
        return self.alpha * self._share(count)

    def _b3(self, count: jax.Array) -> jax.Array:
        """Rises from b1 to b3 so that the average's half-life grows linearly (appendix A.1)."""
        share, low, high = self._share(count), jnp.log(self.b1), jnp.log(self.b3)
        return jnp.exp(low * high / ((1 - share) * high + share * low))

    def _share(self, count: jax.Array) -> jax.Array:
        return jnp.minimum(1.0, (count + 1) / self.warmup) if self.warmup else jnp.float32(1)
