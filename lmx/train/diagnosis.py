"""What to say when gradients stop being finite: which step, which layer, which documents."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmx.adapters.kernels import with_dropout
from lmx.data.prepare import Prepared
from lmx.data.rows import documents_of
from lmx.errors import LmxError
from lmx.experiment import Experiment
from lmx.kernels.telling import listening
from lmx.models.model import cast_floats, unstack_layers
from lmx.models.specs import EncoderSpec, ModelSpec
from lmx.nn.module import Params
from lmx.objectives.objective import Batch
from lmx.optim.names import name_of
from lmx.sharding.rules import Sharding, use_sharding
from lmx.train.state import TrainState
from lmx.train.step import gradients

Flags = dict[str, np.ndarray]
"""By a parameter's name, bool [] or, of a layer's, [repeats]: whether something in it is not finite."""


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
        f"{first_not_finite(experiment, sharding, state, batch, step)}; the batch's documents: {shown}; lower "
        "schedule.peak, raise schedule.warmup, or look at these documents"
    )


def first_not_finite(experiment: Experiment, sharding: Sharding, state: TrainState, batch: Batch, step: int) -> str:
    """Where numbers stop being finite in a step, as a sentence: in the output of which part, going forward through the
    model, or, where all of these and the loss are finite, in the gradient of which part, going backward."""
    key = jax.random.fold_in(jax.random.key(experiment.train.seed), step)
    parts, arguments = list(_parts(experiment.model.spec())), (state.params, state.frozen, batch)
    outputs, loss, params = jax.device_get(_forward(experiment, sharding, key)(*arguments))
    told = itertools.cycle(part.label for part in parts if part.told)
    bad = next((label for label, flag in zip(told, outputs, strict=False) if flag), None)
    if bad is not None:
        found = f"the first output that is not finite is that of {bad}"
    elif loss:
        found = "the outputs of all layers are finite, the loss is not"
    else:
        grads = jax.device_get(_backward(experiment, sharding, key)(*arguments))
        found = _deepest(parts, _named(grads))
    broken = [name for name, flags in _named(params).items() if flags.any()]
    return found + (f"; parameters that are not finite: {', '.join(broken[:4])}" if broken else "")


@dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
      label: what a sentence calls it.
      prefix: what the names of its parameters begin with.
      repeat: of a layer, its place along the first axis of its parameters.
      told: whether a stack tells its output.
    """

    label: str
    prefix: str
    repeat: int | None = None
    told: bool = False

    def has(self, name: str, flags: np.ndarray) -> bool:
        """Whether a parameter of this name is the part's, and flagged."""
        return name.startswith(self.prefix) and bool(flags[() if self.repeat is None else self.repeat])


def _parts(spec: ModelSpec) -> Iterator[Part]:
    """The parts of a model in the order in which it computes them."""
    if spec.encoder is not None:
        yield from _of_stack(spec.encoder, "the encoder's ", "encoder/")
    yield from _of_stack(spec, "the decoder's " if spec.encoder else "", "")
    yield Part("the head", "head/")
    yield Part("the task's head", "tasks/")


def _of_stack(spec: ModelSpec | EncoderSpec, whose: str, prefix: str) -> Iterator[Part]:
    yield Part(f"{whose or 'the '}embedding", f"{prefix}embedding/", told=True)
    yield Part(f"what {whose}layers share", f"{prefix}stack/shared/")
    numbers = itertools.count()
    for i, segment in enumerate(spec.stack.segments):
        for repeat, j in itertools.product(range(segment.repeats), range(len(segment.pattern))):
            path = f"{prefix}stack/segment_{i}/block_{j}/"
            yield Part(f"{whose}layer {next(numbers)} (row {repeat} of {path}*)", path, repeat, told=True)
    yield Part(f"{whose or 'the '}final norm", f"{prefix}final_norm/")


def _forward(experiment: Experiment, sharding: Sharding, key: jax.Array) -> Any:
    """(params, frozen models, batch) -> whether something is not finite in each output that a stack tells, in the
    loss, and in each parameter. Layers are unrolled: what a scan tells does not outlive it."""
    spec = experiment.spec()

    @functools.partial(jax.jit, out_shardings=sharding.replicated())
    def look(params: Params, frozen: Any, batch: Batch) -> Any:
        low = with_dropout(cast_floats(params, experiment.train.compute), key)
        with use_sharding(sharding), listening("hidden") as heard:
            sums = experiment.objective.loss_with(frozen)(spec, unstack_layers(spec, low), batch, key=key)
        outputs = [~jnp.isfinite(output).all() for _, output in heard]
        return outputs, ~jnp.isfinite(sums.total), _flags(params)

    return look


def _backward(experiment: Experiment, sharding: Sharding, key: jax.Array) -> Any:
    """(params, frozen models, batch) -> whether something is not finite in the gradient of each parameter."""

    @functools.partial(jax.jit, out_shardings=sharding.replicated())
    def look(params: Params, frozen: Any, batch: Batch) -> Any:
        with use_sharding(sharding):
            return _flags(gradients(experiment, params, batch, key, frozen)[0])

    return look


def _deepest(parts: list[Part], grads: Flags) -> str:
    """The part in whose gradient numbers first stop being finite, going backward, as a sentence."""
    for part in reversed(parts):
        if any(part.has(name, flags) for name, flags in grads.items()):
            return f"the loss is finite, and going backward the first gradient that is not is that of {part.label}"
    return "computed again with the parameters as they are now, everything is finite"


def _flags(tree: Any) -> Any:
    """One flag for each leaf, of layers' parameters one for each of their rows."""

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        bad = ~jnp.isfinite(leaf)
        return bad.any(tuple(range(1, leaf.ndim))) if "stack/segment_" in name_of(path) else bad.any()

    return jax.tree.map_with_path(one, tree)


def _named(flags: Any) -> Flags:
    return {name_of(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(flags)}
