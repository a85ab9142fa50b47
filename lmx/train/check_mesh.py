"""The check of meshes: real steps of one experiment on one device and on others must give the same numbers.

The rows are random tokens, packed as real ones are: several segments a row, different numbers of targets,
padding. Nothing has to be prepared for them.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import jax
import numpy as np

from lmx.errors import LmxError, UserError
from lmx.experiment import Experiment
from lmx.models.schedules import Plan
from lmx.nn.module import Params
from lmx.objectives import random_rows as packed
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Sharding, use_sharding
from lmx.train.state import init_state, pipeline_plan, state_shardings
from lmx.train.step import BATCH, gradients, jit_step

Rows = dict[str, np.ndarray]
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""The largest relative difference that is rounding, by the dtype of the matrix products."""
FLOOR = 1e-3
"""A leaf's difference is relative to its norm, or to this share of the whole gradient's if that is more: the
gradient of a bias that changes nothing is nothing but rounding."""

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
"""The mesh axes that are tried in all combinations."""


@dataclass(frozen=True)
class Numbers:
    """What a mesh computed.

    Attributes:
      loss, grad_norm: of each step.
      gradient: of the first step, where all start from the same parameters, on the host.
      params: after the last step, on the host.
      memory: bytes that one device holds at the most during a step, as compiled.
      plan: the pipeline's, where there are stages.
    """

    loss: tuple[float, ...]
    grad_norm: tuple[float, ...]
    gradient: Params
    params: Params
    memory: int
    plan: Plan | None = None


@dataclass(frozen=True)
class Trial:
    """One mesh beside the single device; where ``skipped`` says why it could not be tried, the rest is empty.

    Attributes:
      loss, grad_norm: of each step.
      loss_difference, grad_norm_difference: the largest over the steps, relative.
      gradient_difference: the largest of a leaf in the first step: the difference's norm relative to the leaf's.
      gradient_leaf: that leaf.
      param_difference: the largest of any parameter after the last step, absolute.
      memory_bytes_per_device: of the compiled step.
      pipeline: its stages and their bubble, in words; empty without stages.
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
    pipeline: str = ""

    @property
    def worst(self) -> tuple[float, str]:
        """The largest relative difference, and of what."""
        found = [
            (self.loss_difference, "loss"),
            (self.grad_norm_difference, "gradient norm"),
            (self.gradient_difference, f"gradient of {self.gradient_leaf}"),
        ]
        return max(found, key=_rank)


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
        trial = max(tried, key=lambda t: _rank(t.worst))
        value, what = trial.worst
        if value <= self.tolerance:
            return None
        return (
            f"the {what} on the mesh {mesh_name(trial.mesh)} differs from one device's by {value:.1e} "
            f"(relative), more than the {self.tolerance:.0e} of rounding"
        )

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
    """Takes ``steps`` steps from one start on one device and on each mesh.

    Args:
      experiment: what to train; its own mesh and data play no part.
      meshes: which; all that :func:`all_meshes` finds on this machine's devices by default.
      steps: how many.
      progress: is told each mesh before it is tried.

    Raises:
      UserError: there is one device only, or a mesh of ``meshes`` takes more than there are.
    """
    experiment.check()
    if steps < 1:
        raise UserError(f"--steps is {steps}, expected at least 1")
    count = len(jax.devices())
    if count == 1:
        raise UserError("there is one device and nothing to compare it with; add --devices 8")
    key = jax.random.key(experiment.train.seed)
    start = jax.device_get(jax.jit(lambda k: init_state(experiment, k))(key))
    batches = [random_rows(experiment, step) for step in range(steps)]
    single = Trial(sizes_of(MeshConfig(data=1)))
    progress(mesh_name(single.mesh))
    reference = _numbers(experiment, MeshConfig(data=1), start, batches)
    trials = [_compared(single.mesh, reference, reference)]
    for mesh in meshes or all_meshes(count):
        progress(mesh_name(sizes_of(mesh)))
        trials.append(_trial(experiment, mesh, start, batches, reference))
    return MeshCheck(count, steps, TOLERANCE[experiment.train.compute], tuple(trials))


def all_meshes(devices: int) -> tuple[MeshConfig, ...]:
    """Every mesh over data, fsdp, expert, sequence and tensor that takes all ``devices``.

    Slices are left out, being data along another wire, and stages, which need layers and batches that divide.
    """
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


def _rank(difference: tuple[float, str]) -> float:
    """Orders differences by size; a NaN is the largest of all."""
    return math.inf if math.isnan(difference[0]) else difference[0]


def _trial(experiment: Experiment, mesh: MeshConfig, start: Any, batches: Sequence[Rows], reference: Numbers) -> Trial:
    mesh = MeshConfig(**mesh.sizes(_devices_of(mesh)))
    try:
        numbers = _numbers(experiment, mesh, start, batches)
    except UserError as error:  # the mesh does not divide the batch, the heads or another axis
        return Trial(sizes_of(mesh), skipped=str(error))
    return replace(_compared(sizes_of(mesh), numbers, reference), pipeline=str(numbers.plan or ""))


def _devices_of(mesh: MeshConfig) -> int:
    """How many devices a mesh takes: its own product if that is fixed, so that it may leave some idle."""
    fixed = math.prod(sizes_of(mesh).values())
    return fixed if 0 < fixed <= len(jax.devices()) else len(jax.devices())


def _numbers(experiment: Experiment, mesh: MeshConfig, start: Any, batches: Sequence[Rows]) -> Numbers:
    sharding = Sharding(build_mesh(mesh, jax.devices()[: _devices_of(mesh)]), experiment.rules)
    shardings = state_shardings(experiment, sharding)
    # The step donates the state: it must not be a view of the arrays that every mesh starts from.
    state = jax.device_put(start, shardings, may_alias=False)
    placed = [jax.device_put(batch, sharding.named(BATCH)) for batch in batches]
    step = cast(Any, jit_step(experiment, sharding)).lower(state, placed[0]).compile()
    gradient = _jit_gradient(experiment, sharding, shardings.params)
    first, metrics = jax.device_get(gradient(state.params, placed[0])), []
    for batch in placed:
        state, values = step(state, batch)
        metrics.append(jax.device_get(values))
    loss, norm = (tuple(float(m[name]) for m in metrics) for name in ("loss", "grad_norm"))
    return Numbers(loss, norm, first, jax.device_get(state.params), _memory(step), pipeline_plan(experiment, sharding))


def _jit_gradient(experiment: Experiment, sharding: Sharding, params: Any) -> Callable[..., Params]:
    def gradient(params: Params, batch: Any) -> Params:
        key = jax.random.fold_in(jax.random.key(experiment.train.seed), 0)
        with use_sharding(sharding):
            return gradients(experiment, params, batch, key)[0]

    return jax.jit(gradient, in_shardings=(params, sharding.named(BATCH)), out_shardings=params)


def _memory(compiled: Any) -> int:
    """Bytes of arguments, results and temporaries on one device; what is donated counts once."""
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return int(held + stats.temp_size_in_bytes)


def _compared(mesh: dict[str, int], numbers: Numbers, reference: Numbers) -> Trial:
    gradient, leaf = max(_leaf_differences(numbers.gradient, reference.gradient), key=_rank)
    both = zip(jax.tree.leaves(numbers.params), jax.tree.leaves(reference.params), strict=True)
    return Trial(
        mesh=mesh,
        loss=numbers.loss,
        grad_norm=numbers.grad_norm,
        loss_difference=_relative(numbers.loss, reference.loss),
        grad_norm_difference=_relative(numbers.grad_norm, reference.grad_norm),
        gradient_difference=gradient,
        gradient_leaf=leaf,
        param_difference=float(np.max([np.max(np.abs(a - b)) for a, b in both])),
        memory_bytes_per_device=numbers.memory,
    )


def _leaf_differences(grads: Params, reference: Params) -> Iterator[tuple[float, str]]:
    whole = FLOOR * math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in jax.tree.leaves(reference)))
    expected = jax.tree.leaves(reference)
    for (path, grad), other in zip(jax.tree.leaves_with_path(grads), expected, strict=True):
        scale = max(float(np.linalg.norm(other.ravel())), whole)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield float(np.linalg.norm((grad - other).ravel())) / (scale or 1.0), name


def _relative(values: Sequence[float], expected: Sequence[float]) -> float:
    differences = [abs(a - b) / (abs(b) or 1.0) for a, b in zip(values, expected, strict=True)]
    return float(np.max(differences))  # unlike max, this hands a NaN on
