"""What to say when gradients stop being finite: which step, which layer, which documents."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.data.prepare import Prepared
from lmx.data.rows import documents_of
from lmx.errors import LmxError
from lmx.experiment import Experiment
from lmx.nn.module import Params
from lmx.objectives.objective import Batch
from lmx.sharding.rules import Sharding, use_sharding
from lmx.train.state import TrainState
from lmx.train.step import gradients


def not_finite_error(
    experiment: Experiment, sharding: Sharding, prepared: Prepared, state: TrainState, batch: Batch, step: int, row: int
) -> LmxError:
    """The error that ends a run after ``row`` skipped steps in a row, the last of them number ``step`` (from 0)."""
    size, layout = experiment.train.batch, experiment.layout(prepared.tokenizer)
    rows = range(step * size, (step + 1) * size)
    names = documents_of(prepared, rows, length=layout, seed=experiment.train.seed)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return LmxError(
        f"step {step + 1}: the gradient was not finite in {row} steps in a row (each was skipped); "
        f"not finite: {', '.join(bad_layers(experiment, sharding, state, batch, step)[:4])}; the batch's documents: "
        f"{shown}; lower schedule.peak, raise schedule.warmup, or look at these documents"
    )


def bad_layers(experiment: Experiment, sharding: Sharding, state: TrainState, batch: Batch, step: int) -> list[str]:
    """The parameters, or their gradients for this batch, that are not finite; of stacked ones the layers' numbers."""
    key = jax.random.fold_in(jax.random.key(experiment.train.seed), step)

    @functools.partial(jax.jit, out_shardings=sharding.replicated())
    def not_finite(params: Params, frozen: Any, batch: Batch) -> Any:
        with use_sharding(sharding):
            grads, _ = gradients(experiment, params, batch, key, frozen)
        return [jax.tree.map_with_path(_not_finite, tree) for tree in (params, grads)]

    flags = jax.device_get(not_finite(state.params, state.frozen, batch))
    found = [
        _named(what, path, leaf)
        for what, tree in zip(("parameter", "gradient"), flags, strict=True)
        for path, leaf in jax.tree.leaves_with_path(tree)
        if np.any(leaf)
    ]
    return found or ["nothing when computed again with the parameters as they are now"]


def _not_finite(path: Any, leaf: jax.Array) -> jax.Array:
    """One flag, or for a stacked parameter one for each layer."""
    bad = ~jnp.isfinite(leaf)
    return bad.any(tuple(range(1, leaf.ndim))) if path[0].key == "stack" else bad.any()


def _named(what: str, path: Any, flags: np.ndarray) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    layers = f" in layer {', '.join(str(i) for i in np.flatnonzero(flags))}" if flags.ndim else ""
    return f"{what} {name}{layers}"
