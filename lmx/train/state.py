"""The state of training: everything that a step reads and writes, and all that a checkpoint holds."""

import functools
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from lmx.errors import UserError
from lmx.experiment import Experiment
from lmx.models.model import init_params, param_axes
from lmx.models.schedules import Plan, check_pipeline
from lmx.nn.module import Params
from lmx.sharding.rules import Sharding

FIELDS = ["step", "params", "optimizer", "ema", "skipped", "skipped_in_a_row"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=FIELDS, meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """Attributes: int32 ``step`` (the next one); float32 ``params``; the optimizer's state; ``ema`` of the
    parameters (an empty dict without one); int32 counts of skipped steps, in all and in a row."""

    step: jax.Array
    params: Params
    optimizer: Any
    ema: Params
    skipped: jax.Array
    skipped_in_a_row: jax.Array

    @property
    def for_eval(self) -> Params:
        """The averaged parameters if there are any, else the parameters."""
        return self.ema or self.params


def init_state(experiment: Experiment, key: jax.Array) -> TrainState:
    """A fresh state: pure, to be jitted with shardings so that each device makes only its shards."""
    params = init_params(experiment.model.spec(), key)
    zero = jnp.int32(0)
    ema = jax.tree.map(jnp.copy, params) if experiment.train.ema else {}
    return TrainState(zero, params, experiment.optimizer.build().init(params), ema, zero, zero)


def state_shapes(experiment: Experiment) -> TrainState:
    """The state as ``jax.ShapeDtypeStruct``."""
    return cast(TrainState, jax.eval_shape(functools.partial(init_state, experiment), jax.random.key(0)))


def pipeline_plan(experiment: Experiment, sharding: Sharding) -> Plan | None:
    """How a step goes through the mesh's stages; None where there is one. Raises UserError if it does not fit."""
    train, spec = experiment.train, experiment.model.spec()
    return check_pipeline(experiment.pipeline, sharding, spec, train.batch // train.accumulate)


def state_shardings(experiment: Experiment, sharding: Sharding) -> TrainState:
    """A sharding for each leaf: the moments and the average lie as the parameters do, scalars are replicated.

    Raises:
      UserError: the mesh does not divide a parameter, the batch or the length.
    """
    pipeline_plan(experiment, sharding)
    shapes, axes = state_shapes(experiment), param_axes(experiment.model.spec())
    sharding.check_divides(axes, shapes.params)
    sharding.check_length(experiment.train.length)
    ways, micro = sharding.ways("act_batch"), experiment.train.batch // experiment.train.accumulate
    if micro % ways:
        raise UserError(
            f"the mesh splits the batch into {ways}, which does not divide the {micro} sequences of a microbatch "
            f"(train.batch / train.accumulate); choose a multiple of {ways}"
        )
    by_param = sharding.tree(axes)
    structure = jax.tree.structure(shapes.params)

    def is_params(tree: Any) -> Any:
        return cast(Any, jax.tree.structure(tree)) == structure

    def place(tree: Any) -> Any:
        return by_param if is_params(tree) else sharding.replicated()

    return cast(TrainState, jax.tree.map(place, shapes, is_leaf=is_params))
