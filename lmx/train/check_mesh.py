"""The check of meshes: real steps of one experiment on one device and on others must give the same numbers.

The rows are random tokens, packed as real ones are: several segments a row, different numbers of targets,
padding. Nothing has to be prepared for them.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
import numpy as np

from lmx.errors import LmxError, UserError
from lmx.experiment import Experiment
from lmx.nn.module import Params
from lmx.objectives import random_rows as packed
from lmx.optim.schedule import Schedule
from lmx.sharding.mesh import MeshConfig
from lmx.train.mesh_trial import ONE, Numbers, Work, devices_of, plan_on, sharding_of
from lmx.train.near_ties import Rows
from lmx.train.state import init_state, state_shardings

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""The largest relative difference that is rounding, by the dtype of the matrix products."""
FLOOR = 1e-3
"""A leaf's difference is relative to its norm, or to this share of the whole gradient's if that is more: the
gradient of a bias that changes nothing is nothing but rounding."""
PARAMETERS = 0.05
"""The largest difference of a parameter after the steps, in learning rates, that is rounding."""
AXES = ("data", "fsdp", "stage", "expert", "sequence", "tensor")
"""The mesh axes that are tried in all combinations."""


@dataclass(frozen=True)
class Trial:
    """One mesh beside the single device; where ``skipped`` says why it could not be tried, the rest is empty.

    Attributes:
      loss, grad_norm: of each step.
      loss_difference, grad_norm_difference: the largest over the steps, relative.
      gradient_difference: the largest of a leaf in the first step: the difference's norm relative to the leaf's.
      gradient_leaf: that leaf.
      param_difference: the largest of any parameter after the last step, in learning rates, where its gradient was
        more than rounding in every step.
      memory_bytes_per_device: of the compiled step.
      sent_bytes_per_device: in a step, by mesh axis; ``data+fsdp`` is along both at once.
      pipeline: its stages and their bubble, in words; empty without stages.
      emptied: rows that were left out of the steps, because rounding would have chosen their experts.
    """

    mesh: dict[str, int]
    skipped: str | None = None
    loss: tuple[float, ...] = ()
    grad_norm: tuple[float, ...] = ()
    loss_difference: float = 0.0
    grad_norm_difference: float = 0.0
    gradient_difference: float = 0.0
    gradient_leaf: str = ""
    param_difference: float = 0.0
    memory_bytes_per_device: int = 0
    sent_bytes_per_device: dict[str, int] = field(default_factory=dict)
    pipeline: str = ""
    emptied: int = 0

    def failure(self, tolerance: float) -> tuple[float, str]:
        """The worst difference, in those that are rounding, and the sentence about it."""
        found = [
            (self.loss_difference, "loss"),
            (self.grad_norm_difference, "gradient norm"),
            (self.gradient_difference, f"gradient of {self.gradient_leaf}"),
        ]
        value, what = max(found, key=_rank)
        worst = (
            value / tolerance,
            f"the {what} {{}} by {value:.1e} (relative), more than the {tolerance:.0e} of rounding",
        )
        moved = (
            self.param_difference / PARAMETERS,
            (f"a parameter {{}} by {self.param_difference:.1e} of the learning rate, more than {PARAMETERS}"),
        )
        times, sentence = max(worst, moved, key=_rank)
        return times, sentence.format(f"on the mesh {mesh_name(self.mesh)} differs from one device's")


@dataclass(frozen=True)
class MeshCheck:
    """The single device first, then every other mesh; ``tolerance`` is what their differences are held to."""

    devices: int
    steps: int
    tolerance: float
    trials: tuple[Trial, ...]

    def data(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {**asdict(self), "same": self.failure() is None}

    def failure(self) -> str | None:
        """The sentence that names the worst difference beyond rounding, or None."""
        tried = [t for t in self.trials[1:] if not t.skipped]
        if not tried:
            reasons = "; ".join(f"{mesh_name(t.mesh)}: {t.skipped}" for t in self.trials[1:])
            return f"no mesh could be tried: {reasons}"
        times, sentence = max((t.failure(self.tolerance) for t in tried), key=_rank)
        return None if times <= 1 else sentence

    def verify(self) -> None:
        """Raises LmxError with :meth:`failure`, if there is one."""
        failure = self.failure()
        if failure:
            raise LmxError(failure)


def check_mesh(
    experiment: Experiment,
    meshes: Sequence[MeshConfig] = (),
    steps: int = 2,
    progress: Callable[[str], None] = lambda name: None,
) -> MeshCheck:
    """Takes ``steps`` steps from one start on one device and on each mesh, at the schedule's peak.

    A mesh with stages is compared with one device that accumulates as many microbatches, both without dropout. Rows
    whose experts rounding would choose are left out: see :mod:`lmx.train.near_ties`.

    Args:
      experiment: what to train; its own mesh and data play no part.
      meshes: which; all that :func:`all_meshes` finds on this machine's devices by default.
      steps: how many.
      progress: is told each mesh before it is tried, and the time that is left.

    Raises:
      UserError: there is one device only, a mesh of ``meshes`` takes more than there are, or the loss reads a model
        beside the one that is trained.
    """
    experiment.check()
    if steps < 1:
        raise UserError(f"--steps is {steps}, expected at least 1")
    count = len(jax.devices())
    if count == 1:
        raise UserError("there is one device and nothing to compare it with; add --devices 8")
    asked = [MeshConfig(**mesh.sizes(devices_of(mesh))) for mesh in meshes or all_meshes(count)]
    progress(mesh_name(sizes_of(ONE)))
    bench = Bench(_work(experiment, steps))
    work, single = bench.reference(1, True)
    trials = [_compared(ONE, work, single, single), *bench.trials(asked, progress)]
    return MeshCheck(count, steps, TOLERANCE[experiment.train.compute], tuple(trials))


@dataclass
class Bench:
    """Where meshes are tried, beside the one device's numbers that were needed so far."""

    work: Work

    def __post_init__(self) -> None:
        self._references: dict[tuple[int, bool], tuple[Work, Numbers]] = {}
        self._lock = threading.Lock()

    def reference(self, microbatches: int, drawn: bool) -> tuple[Work, Numbers]:
        """One device's work and numbers: as it is, or like a pipeline of so many microbatches."""
        with self._lock:
            if (microbatches, drawn) not in self._references:
                work = self.work if drawn else self.work.accumulated(microbatches)
                self._references[microbatches, drawn] = work.decided()
            return self._references[microbatches, drawn]

    def trials(self, meshes: Sequence[MeshConfig], progress: Callable[[str], None]) -> Iterator[Trial]:
        """Each mesh; two at a time are compiled, because tracing takes one core and compilation the other."""
        started = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            results = pool.map(self.trial, meshes)
            for done, mesh in enumerate(meshes):
                left = (time.monotonic() - started) / max(done, 1) * (len(meshes) - done)
                time_left = f", {_minutes(left)} left" if done else ""
                progress(f"{mesh_name(sizes_of(mesh))} ({done + 1} of {len(meshes)}{time_left})")
                yield next(results)

    def trial(self, mesh: MeshConfig) -> Trial:
        """A mesh beside one device."""
        experiment = self.work.experiment
        try:
            state_shardings(experiment, sharding_of(experiment, mesh))  # what does not fit says so at once
            plan = plan_on(experiment, mesh)
            work, reference = self.reference(plan.microbatches if plan else 1, plan is None)
            numbers = replace(work, experiment=experiment).on(mesh)
        except UserError as error:  # the mesh does not divide the batch, the heads or another axis
            return Trial(sizes_of(mesh), skipped=str(error))
        return replace(_compared(mesh, work, numbers, reference), pipeline=str(plan or ""))


def all_meshes(devices: int) -> tuple[MeshConfig, ...]:
    """Every mesh over :data:`AXES` that takes all ``devices``; slices are left out, being data along another wire."""
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    found = (s for s in itertools.product(divisors, repeat=len(AXES)) if math.prod(s) == devices)
    return tuple(MeshConfig(**dict(zip(AXES, sizes, strict=True))) for sizes in found)


def sizes_of(mesh: MeshConfig) -> dict[str, int]:
    """The axes and their sizes, ``-1`` left as it is."""
    return dict(asdict(mesh))


def mesh_name(sizes: dict[str, int]) -> str:
    """As the command line takes it: ``data=2,fsdp=4``."""
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "one device"


def random_rows(experiment: Experiment, step: int) -> Rows:
    """A batch of packed random documents in the objective's layout, int32 [batch, any] each, as the loader gives it."""
    train = experiment.train
    seed = (train.seed, step)
    return packed.random_rows(experiment.objective, experiment.model.spec(), train.batch, train.length, seed)


def _work(experiment: Experiment, steps: int) -> Work:
    """The steps that all take, at the schedule's peak: a warm-up's first steps move nothing by more than rounding."""
    if experiment.objective.models:
        raise UserError(
            f"the objective reads {' and '.join(experiment.objective.models)} beside the model, and random rows have "
            "none to go with: check the meshes with an objective that reads the trained model alone"
        )
    constant = replace(experiment, schedule=Schedule("constant", peak=experiment.schedule.peak, warmup=0))
    key = jax.random.key(experiment.train.seed)
    start = jax.device_get(jax.jit(lambda k: init_state(experiment, k))(key))
    return Work(constant, start, tuple(random_rows(experiment, step) for step in range(steps)))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def _rank(difference: tuple[float, str]) -> float:
    """Orders differences by size; a NaN is the largest of all."""
    return math.inf if math.isnan(difference[0]) else difference[0]


def _compared(mesh: MeshConfig, work: Work, numbers: Numbers, reference: Numbers) -> Trial:
    gradient, leaf = max(_leaf_differences(numbers.gradient, reference.gradient), key=_rank)
    return Trial(
        mesh=sizes_of(mesh),
        loss=numbers.loss,
        grad_norm=numbers.grad_norm,
        loss_difference=_relative(numbers.loss, reference.loss),
        grad_norm_difference=_relative(numbers.grad_norm, reference.grad_norm),
        gradient_difference=gradient,
        gradient_leaf=leaf,
        param_difference=_moved(numbers, reference, TOLERANCE[work.experiment.train.compute]),
        memory_bytes_per_device=numbers.memory,
        sent_bytes_per_device=numbers.sent,
        emptied=work.emptied,
    )


def _scales(reference: Params) -> Iterator[tuple[str, np.ndarray, float]]:
    """Each leaf's name, the leaf, and the norm that its differences are relative to."""
    whole = FLOOR * math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in jax.tree.leaves(reference)))
    for path, leaf in jax.tree.leaves_with_path(reference):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf, max(float(np.linalg.norm(leaf)), whole)


def _leaf_differences(grads: Params, reference: Params) -> Iterator[tuple[float, str]]:
    for grad, (name, expected, scale) in zip(jax.tree.leaves(grads), _scales(reference), strict=True):
        yield float(np.linalg.norm((grad - expected).ravel())) / (scale or 1.0), name


def _moved(numbers: Numbers, reference: Numbers, tolerance: float) -> float:
    """The largest difference of a parameter, in learning rates.

    An optimizer may blow a gradient up to a whole learning rate, so that of one whose rounding is more than the share
    PARAMETERS of it nothing can be said.
    """
    found, rate = [0.0], max(reference.learning_rate)
    trees = (numbers.params, reference.params, reference.smallest)
    for ours, one, least, (*_, scale) in zip(*map(jax.tree.leaves, trees), _scales(reference.gradient), strict=True):
        clear = least > tolerance / PARAMETERS * scale / math.sqrt(least.size)
        found.append(float(np.max(np.abs(ours - one), where=clear, initial=0.0)))
    return float(np.max(found)) / (rate or 1.0)


def _relative(values: Sequence[float], expected: Sequence[float]) -> float:
    differences = [abs(a - b) / (abs(b) or 1.0) for a, b in zip(values, expected, strict=True)]
    return float(np.max(differences))  # unlike max, this hands a NaN on
