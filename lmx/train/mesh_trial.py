"""What a few steps of an experiment compute on one mesh, from one program of which each mesh compiles its own."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from lmx.experiment import Experiment
from lmx.models.schedules import Plan
from lmx.nn.module import Params
from lmx.sharding.collectives import bytes_by_axes, collectives
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Sharding, use_sharding
from lmx.train.near_ties import Rows, emptier
from lmx.train.state import TrainState, pipeline_plan, state_shardings, trained
from lmx.train.step import BATCH, advance, gradients, step_key

ONE = MeshConfig(data=1)
_running = threading.Lock()
"""Meshes are compiled side by side, but run one after the other: two programs that take the same devices in different
orders would wait for each other."""
Change = Callable[[TrainState, Rows], Rows]


@dataclass(frozen=True)
class Numbers:
    """What a mesh computed.

    Attributes:
      loss, grad_norm, learning_rate: of each step.
      gradient: of the first step, where all start from the same parameters, on the host.
      params: after the last step, on the host.
      memory: bytes that one device holds at the most during a step that also gives its gradient away, as compiled.
      sent: bytes that one device sends in a step, by mesh axis: see :mod:`lmx.sharding.collectives`.
      smallest: of each parameter, the smallest size of its gradient in any step, on the host.
    """

    loss: tuple[float, ...]
    grad_norm: tuple[float, ...]
    learning_rate: tuple[float, ...]
    gradient: Params
    params: Params
    memory: int
    sent: dict[str, int]
    smallest: Params


@dataclass(frozen=True)
class Work:
    """The steps that every mesh takes.

    Attributes:
      experiment: what is trained.
      start: the state before the first step, on the host.
      batches: the rows of each step.
      drawn: whether dropout is drawn.
      emptied: how many rows were emptied in these batches: see :mod:`lmx.train.near_ties`.
    """

    experiment: Experiment
    start: TrainState
    batches: tuple[Rows, ...]
    drawn: bool = True
    emptied: int = 0

    def on(self, mesh: MeshConfig, change: Change = lambda state, rows: rows) -> Numbers:
        """The numbers of a mesh; ``change`` may change a step's rows once the state before it is known.

        Raises:
          UserError: the mesh does not divide the batch, the heads or another axis.
        """
        sharding = sharding_of(self.experiment, mesh)
        shardings = state_shardings(self.experiment, sharding)
        step = self._program(sharding, shardings).lower(self.start, self.batches[0]).compile(_quick())
        sent = bytes_by_axes(collectives(step.as_text(), sharding.mesh.shape))
        grads, metrics = list[Params](), list[Any]()
        with _running:
            # The step donates the state: it must not be a view of the arrays that every mesh starts from.
            state = jax.device_put(self.start, shardings, may_alias=False)
            for rows in self.batches:
                rows = jax.device_put(change(state, rows), sharding.named(BATCH))
                state, told, grad = step(state, rows)
                grads.append(jax.device_get(grad))
                metrics.append(jax.device_get(told))
            params = jax.device_get(trained(self.experiment, state.params))
        loss, norm, rate = (tuple(float(m[name]) for m in metrics) for name in ("loss", "grad_norm", "learning_rate"))
        smallest = jax.tree.map(lambda *each: np.min(np.abs(each), axis=0), *grads)
        return Numbers(loss, norm, rate, grads[0], params, _memory(step), sent, smallest)

    def _program(self, sharding: Sharding, shardings: TrainState) -> Any:
        def step(state: TrainState, batch: Any) -> Any:
            key = step_key(self.experiment, state) if self.drawn else None
            with use_sharding(sharding):
                grads, sums = gradients(self.experiment, state.params, batch, key)
                return *advance(self.experiment, state, batch, grads, sums), grads

        return jax.jit(
            step,
            in_shardings=(shardings, sharding.named(BATCH)),
            out_shardings=(shardings, sharding.replicated(), trained(self.experiment, shardings.params)),
            donate_argnums=0,
        )

    def accumulated(self, microbatches: int) -> "Work":
        """The work whose one device does what a pipeline with so many microbatches does.

        Routers' losses go by microbatch, so one device accumulates as many; and dropout is drawn by microbatch and
        stage, so there is none.
        """
        train = self.experiment.train
        train = replace(train, accumulate=train.accumulate * microbatches)
        return replace(self, experiment=replace(self.experiment, train=train), drawn=False)

    def decided(self) -> tuple["Work", Numbers]:
        """The same without rows whose experts rounding would choose, and its numbers on one device."""
        kept, empty, counts = list[Rows](), emptier(self.experiment), list[int]()

        def change(state: TrainState, rows: Rows) -> Rows:
            key = step_key(self.experiment, state) if self.drawn else None
            rows, count = empty(state.params, rows, key)
            kept.append(rows)
            counts.append(count)
            return rows

        numbers = self.on(ONE, change)
        return replace(self, batches=tuple(kept), emptied=sum(counts)), numbers


def sharding_of(experiment: Experiment, mesh: MeshConfig) -> Sharding:
    """The experiment's rules on a mesh, whose devices are the first of this machine's that it takes."""
    return Sharding(build_mesh(mesh, jax.devices()[: devices_of(mesh)]), experiment.rules)


def plan_on(experiment: Experiment, mesh: MeshConfig) -> Plan | None:
    """The pipeline's plan, where the mesh has stages. Raises UserError where they do not fit."""
    return pipeline_plan(experiment, sharding_of(experiment, mesh))


def devices_of(mesh: MeshConfig) -> int:
    """How many devices a mesh takes: its own product if that is fixed, so that it may leave some idle."""
    fixed = math.prod(vars(mesh).values())
    free = any(size < 0 for size in vars(mesh).values())
    return len(jax.devices()) if free or fixed > len(jax.devices()) else fixed


def _quick() -> dict[str, Any]:
    """Compiler options: on CPU hundreds of programs are compiled that run twice each, so little is optimised."""
    if jax.devices()[0].platform != "cpu":
        return {}
    emitters = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
    return {"xla_backend_optimization_level": 0, **emitters}


def _memory(compiled: Any) -> int:
    """Bytes of arguments, results and temporaries on one device; what is donated counts once."""
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return int(held + stats.temp_size_in_bytes)
