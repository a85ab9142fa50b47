"""The schedules of a pipeline, as numbers: how many microbatches go through how many stages, and what that wastes."""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast

from lmx.errors import UserError
from lmx.models.specs import ModelSpec, StackSpec
from lmx.sharding.rules import Sharding, current, manual_axes, nearest_multiple

Schedule = Literal["gpipe", "circular", "1f1b"]


@dataclass(frozen=True)
class PipelineConfig:
    """How microbatches go through the stages; means nothing on a mesh of one stage."""

    schedule: Schedule = "gpipe"
    """All forward, then all backward (gpipe); the same with several parts of the layers on every stage, which wastes
    less time (circular); or forward and backward in turn, which keeps fewer activations (1f1b)."""
    microbatches: int = 0
    """Parts that a batch is cut into; 0: four for each stage, or the most below that which divide the batch."""
    chunks: int = 2
    """Parts of the layers on each stage under the circular schedule."""


@dataclass(frozen=True)
class Plan:
    """A schedule with its numbers; ``chunks`` is 1 except under the circular one."""

    schedule: Schedule
    stages: int
    chunks: int
    microbatches: int

    @property
    def ticks(self) -> int:
        """Steps in lock-step until every microbatch is through; under 1f1b each is a forward and a backward."""
        turns = 2 if self.schedule == "1f1b" else 1
        return self.chunks * self.microbatches + turns * (self.stages - 1)

    @property
    def bubble(self) -> float:
        """The share of each stage's ticks that does no work: (s - 1) / (m v + s - 1) with s stages, m microbatches and
        v chunks; 2 (s - 1) / (m + 2 (s - 1)) under 1f1b in lock-step."""
        return 1 - self.chunks * self.microbatches / self.ticks

    def __str__(self) -> str:
        chunks = f", {self.chunks} chunks each" if self.chunks > 1 else ""
        return (
            f"pipeline {self.schedule}: {self.stages} stages{chunks}, {self.microbatches} microbatches, "
            f"bubble {self.bubble:.1%}"
        )


DEFAULT = PipelineConfig()
_config: contextvars.ContextVar[PipelineConfig] = contextvars.ContextVar("pipeline", default=DEFAULT)


@contextlib.contextmanager
def use_pipeline(config: PipelineConfig) -> Iterator[None]:
    """Within the block (where a function is traced), stages work by this schedule; by the default one elsewhere."""
    token = _config.set(config)
    try:
        yield
    finally:
        _config.reset(token)


def stages(sharding: Sharding | None = None) -> int:
    """The stages of this mesh, or of the current one; 1 inside the region of a pipeline."""
    sharding = sharding or current()
    return 1 if sharding is None or "stage" in manual_axes() else sharding.mesh.shape.get("stage", 1)


def schedule() -> Schedule:
    """The schedule in use."""
    return _config.get().schedule


def make_plan(config: PipelineConfig, sharding: Sharding, batch: int) -> Plan:
    """The plan for ``batch`` rows over all devices.

    Raises:
      UserError: numbers that do not fit, with the nearest that do.
    """
    chunks = config.chunks if config.schedule == "circular" else 1
    if chunks < 1 or config.microbatches < 0:
        what = f"chunks is {chunks}" if chunks < 1 else f"microbatches is {config.microbatches}"
        raise UserError(f"pipeline.{what}, expected at least {1 if chunks < 1 else 0}")
    count, parts = stages(sharding), sharding.ways("act_batch")
    parts //= count if "stage" in sharding.axes("act_batch") else 1
    if batch % parts:
        raise UserError(
            f"the mesh splits the batch into {parts}, which does not divide its {batch} rows; the nearest number that "
            f"it divides is {nearest_multiple(batch, parts)}"
        )
    fits = [m for m in range(1, batch // parts + 1) if (batch // parts) % m == 0]
    if chunks > 1:
        fits = [m for m in fits if m >= count]
    if not fits:
        raise UserError(
            f"the circular schedule needs at least one microbatch for each of the {count} stages, but a batch of "
            f"{batch} rows over {parts} devices makes at most {batch // parts}; set the batch to a multiple of "
            f"{count * parts}"
        )
    wanted = config.microbatches or max([m for m in fits if m <= 4 * count], default=fits[0])
    if wanted not in fits:
        near = min(fits, key=lambda m: (abs(m - wanted), m))
        raise UserError(
            f"pipeline.microbatches {wanted} does not fit {batch // parts} rows a device on {count} stages; "
            f"the nearest that does is {near}"
        )
    return Plan(config.schedule, count, chunks, wanted)


def plan_here(batch: int) -> Plan:
    """The plan for the current mesh and schedule: see :func:`make_plan`."""
    return make_plan(_config.get(), cast(Sharding, current()), batch)


def check_stack(plan: Plan, stack: StackSpec) -> None:
    """Raises UserError if the stages do not divide the longest segment, or if 1f1b meets one that is not the last."""
    segment, parts = stack.segments[stack.longest], plan.stages * plan.chunks
    if segment.repeats % parts:
        near = nearest_multiple(segment.repeats, parts)
        each = f"{len(segment.pattern)} layers each" if len(segment.pattern) > 1 else "one layer each"
        raise UserError(
            f"{plan.stages} stages of {plan.chunks} chunks do not divide the {segment.repeats} repeats ({each}) of the "
            f"stack's longest segment; the nearest that they divide is {near} repeats"
        )
    if plan.schedule == "1f1b" and stack.longest != len(stack.segments) - 1:
        raise UserError(
            "the schedule 1f1b needs the longest segment of the stack to be its last, and here layers of another kind "
            "come after it; set pipeline.schedule to gpipe or circular"
        )


def check_pipeline(config: PipelineConfig, sharding: Sharding, spec: ModelSpec, batch: int) -> Plan | None:
    """How batches of so many rows go through the stages; None on a mesh of one stage.

    Raises:
      UserError: the stages do not divide the model's layers, or the microbatches the batch.
    """
    if stages(sharding) == 1:
        return None
    plan = make_plan(config, sharding, batch)
    check_stack(plan, spec.stack)
    if spec.encoder is not None:
        check_stack(outside_of_loss(plan), spec.encoder.stack)
    return plan


def outside_of_loss(plan: Plan) -> Plan:
    """The plan for layers that the loss does not follow, as an encoder's: 1f1b turns around at the loss."""
    return replace(plan, schedule="gpipe") if plan.schedule == "1f1b" else plan
