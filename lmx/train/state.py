"""The state of training: everything that a step reads and writes, and what of it a checkpoint holds."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from lmx.errors import UserError
from lmx.experiment import Experiment
from lmx.models.model import init_params, param_axes, param_shapes
from lmx.models.schedules import Plan, check_pipeline
from lmx.nn.module import Params
from lmx.objectives.objective import Frozen
from lmx.optim.names import pick, put
from lmx.optim.placement import placed
from lmx.sharding.rules import Sharding, nearest_multiple

FIELDS = ["step", "params", "optimizer", "ema", "skipped", "skipped_in_a_row", "frozen"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=FIELDS, meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """Attributes: int32 ``step`` (the next one); the ``params`` of the model, adapters among them; the optimizer's
    state and ``ema``, an average (an empty dict without one), of those that are trained, which are float32; int32
    counts of skipped steps, in all and in a row; ``frozen``, the models that the loss reads and no step changes."""

    step: jax.Array
    params: Params
    optimizer: Any
    ema: Params
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    frozen: Mapping[str, Frozen] = field(default_factory=dict)

    @property
    def for_eval(self) -> Params:
        """The parameters, with the averages in the place of those that have one."""
        return cast(Params, put(self.params, self.ema))


def trained(experiment: Experiment, tree: Any) -> Params:
    """Of the parameters, or a tree parallel to them, what a step changes."""
    return pick(tree, experiment.trains)


def saved(experiment: Experiment, state: TrainState) -> TrainState:
    """What a checkpoint holds: all but the frozen models and the model beside an adapter, which come from where they
    came from."""
    params = trained(experiment, state.params) if experiment.adapter.alone else state.params
    return replace(state, params=params, frozen={})


def axes_of(experiment: Experiment) -> Params:
    """The logical axes of a state's parameters."""
    return experiment.adapter.axes(param_axes(experiment.model.spec()))


def transformation(experiment: Experiment) -> optax.GradientTransformationExtraArgs:
    """The optimizer, of the parameters that are trained."""
    return experiment.optimizer.build(trained(experiment, axes_of(experiment)))


def init_state(experiment: Experiment, key: jax.Array, base: Params | None = None) -> TrainState:
    """A fresh state: pure, to be jitted with shardings so that each device makes only its shards.

    ``base`` are the model's parameters; fresh ones by default.
    """
    spec, zero = experiment.model.spec(), jnp.int32(0)
    params = experiment.adapter.adapt(init_params(spec, key) if base is None else base, param_axes(spec), key)
    own = trained(experiment, params)
    ema = jax.tree.map(jnp.copy, own) if experiment.train.ema else {}
    return TrainState(zero, params, transformation(experiment).init(own), ema, zero, zero)


def state_shapes(experiment: Experiment) -> TrainState:
    """The state as ``jax.ShapeDtypeStruct``."""
    base = param_shapes(experiment.model.spec())
    return cast(TrainState, jax.eval_shape(functools.partial(init_state, experiment), jax.random.key(0), base))


def pipeline_plan(experiment: Experiment, sharding: Sharding) -> Plan | None:
    """How a step goes through the mesh's stages; None where there is one. Raises UserError if it does not fit."""
    train, spec = experiment.train, experiment.model.spec()
    return check_pipeline(experiment.pipeline, sharding, spec, train.batch // train.accumulate)


def state_shardings(
    experiment: Experiment, sharding: Sharding, frozen: Mapping[str, Frozen] | None = None
) -> TrainState:
    """A sharding for each leaf: moments and averages lie as their parameters do, scalars are replicated.

    Args:
      experiment: says what is trained, and how.
      sharding: the mesh and the rules.
      frozen: the frozen models of the state, or their shapes.

    Raises:
      UserError: the mesh does not divide a parameter, the batch or the length.
    """
    pipeline_plan(experiment, sharding)
    shapes, axes = state_shapes(experiment), axes_of(experiment)
    sharding.check_divides(axes, shapes.params)
    sharding.check_length(experiment.train.length)
    ways, micro = sharding.ways("act_batch"), experiment.train.batch // experiment.train.accumulate
    if micro % ways:
        raise UserError(
            f"the mesh splits the batch into {ways}, which does not divide the {micro} sequences of a microbatch "
            f"(train.batch / train.accumulate); the nearest number that it divides is {nearest_multiple(micro, ways)}"
        )
    own, own_axes, everywhere = (
        trained(experiment, shapes.params),
        trained(experiment, axes),
        cast(Any, sharding.replicated()),
    )
    optimizer = placed(shapes.optimizer, own, own_axes, sharding.named)
    ema = sharding.tree(own_axes) if experiment.train.ema else {}
    models = {name: replace(m, params=sharding.tree(param_axes(m.spec))) for name, m in (frozen or {}).items()}
    return TrainState(everywhere, sharding.tree(axes), optimizer, ema, everywhere, everywhere, models)


def jit_init(experiment: Experiment, sharding: Sharding) -> Callable[[jax.Array], TrainState]:
    """:func:`init_state` of a key as one program: each device makes only its shards."""
    return jax.jit(functools.partial(init_state, experiment), out_shardings=state_shardings(experiment, sharding))
