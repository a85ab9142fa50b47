"""Tokens whose router is undecided: where rounding chooses the experts, two meshes may compute different things.

A row with such a token is emptied (it becomes padding), so that no other choice, no attention and no loss sees it, and
counted. What a row holds does not reach others, but for the means of routers' losses, which are of the rows left.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lmx.errors import UserError
from lmx.experiment import Experiment
from lmx.models.model import cast_floats
from lmx.nn.context import Context, SublayerOutput
from lmx.nn.module import Params, Part
from lmx.nn.moe import Moe, MoeModule

Rows = dict[str, np.ndarray]
MARGIN = 1e-5
"""A choice is undecided where its router's scores would have to change by less than this."""


@dataclass(frozen=True)
class AskingMoe(Moe):
    """A mixture that also tells, float32 [batch], how far the choices of each row's tokens are from others."""

    def inner(self, width: int) -> Part:
        """The module for inputs [batch, length, width]."""
        return Part(functools.partial(AskingModule, self, width))


class AskingModule(MoeModule):
    """See :class:`AskingMoe`."""

    def __call__(self, x: jax.Array, context: Context) -> SublayerOutput:
        """``margin`` comes to what is told."""
        out = super().__call__(x, context)
        margin = jnp.where(context.segments > 0, self.router.margin(x), jnp.inf).min(1)
        return replace(out, aux={**out.aux, "margin": margin})


def asking(spec: Any) -> Any:
    """A model's spec, or a part of one, with every mixture an :class:`AskingMoe`."""
    if isinstance(spec, Moe):
        return AskingMoe(**{f.name: getattr(spec, f.name) for f in fields(spec)})
    if isinstance(spec, tuple):
        return tuple(asking(part) for part in spec)
    if not is_dataclass(spec) or isinstance(spec, type):
        return spec
    return replace(spec, **{f.name: asking(getattr(spec, f.name)) for f in fields(spec) if f.init})


Empty = Callable[[Params, Rows, jax.Array | None], tuple[Rows, int]]
"""(parameters, rows, the step's key) -> the rows with undecided ones emptied, and how many those are."""


def emptier(experiment: Experiment) -> Empty:
    """What empties undecided rows on one device, as a step computes them; without a mixture it gives all rows back."""
    spec, count = experiment.model.spec(), experiment.train.accumulate
    asked = asking(spec)
    if asked == spec:
        return lambda params, rows, key: (rows, 0)

    @jax.jit
    def margins(params: Params, batch: Any, key: jax.Array | None) -> jax.Array:
        sums = experiment.objective.loss(asked, cast_floats(params, experiment.train.compute), batch, key=key)
        told = [leaf for path, leaf in jax.tree.leaves_with_path(sums.aux) if _name(path) == "margin"]
        return jnp.stack([leaf.reshape(-1, leaf.shape[-1]).min(0) for leaf in told]).min(0) / sums.weight

    def empty(params: Params, rows: Rows, key: jax.Array | None) -> tuple[Rows, int]:
        undecided = np.zeros(experiment.train.batch, bool)
        for micro in range(count):  # the rows, and the keys, of a microbatch of the step
            own = None if key is None else jax.random.fold_in(key, micro) if count > 1 else key
            part = {name: array[micro::count] for name, array in rows.items()}
            undecided[micro::count] = np.asarray(margins(params, part, own)) < MARGIN
        return emptied(rows, undecided), int(undecided.sum())

    return empty


def emptied(rows: Rows, undecided: np.ndarray) -> Rows:
    """The rows, those of bool [batch] ``undecided`` as nothing but padding.

    Raises:
      UserError: none is left.
    """
    if undecided.all():
        raise UserError(
            f"every row has a token whose experts are within {MARGIN:g} of a tie, so that rounding chooses them; check "
            "with fewer layers, a shorter train.length or more rows (train.batch)"
        )
    return {name: np.where(undecided[:, None], 0, array) for name, array in rows.items()}


def _name(path: Any) -> str:
    return cast(str, path[-1].key.split("/")[-1])
