"""The device mesh: one function, named axes, and clear words when the axes do not divide the devices."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

from lmx.errors import UserError


@dataclass(frozen=True)
class MeshConfig:
    """How many ways each kind of parallelism splits the devices. One axis may be -1, "the rest"; -8, say, is "up to 8":
    the largest number up to 8 that divides what the fixed axes leave."""

    slice: int = 1
    """Slices, or other groups of devices that only the data-centre network connects; splits the batch. Where it is less
    than the slices that there are, a pipeline goes across them: stage is then a multiple of the rest."""
    data: int = -1
    """Replicas of the model, each on its own part of the batch."""
    fsdp: int = 1
    """Shards of the parameters, gradients and optimizer state; also splits the batch."""
    stage: int = 1
    """Stages of a pipeline, each with its part of the layers."""
    expert: int = 1
    """Shards of the experts of a mixture; also splits the batch, outside of those."""
    sequence: int = 1
    """Shards of every sequence's length; rules.sequence_attention says how attention reaches across."""
    tensor: int = 1
    """Shards of every layer's heads and hidden units, and of the vocabulary."""

    def sizes(self, devices: int) -> dict[str, int]:
        """The axes' sizes on ``devices`` devices, "the rest" filled in.

        Raises:
          UserError: more than one -1, a size of 0, or a product that is not the number of devices.
        """
        sizes = {f.name: getattr(self, f.name) for f in fields(self)}
        free = [name for name, size in sizes.items() if size == -1]
        wrong = [name for name, size in sizes.items() if size == 0]
        if len(free) > 1 or wrong:
            what = f"mesh.{wrong[0]} is 0" if wrong else f"mesh.{free[0]} and mesh.{free[1]} are -1"
            raise UserError(f"{what}; each axis is at least 1, or at most one of them -1 for 'the rest'")
        left, over = divmod(devices, math.prod(size for size in sizes.values() if size > 0))
        for name, size in sizes.items():
            if size < -1 and not over:
                sizes[name] = max(n for n in range(1, -size + 1) if left % n == 0)
                left //= sizes[name]
        fixed = math.prod(size for size in sizes.values() if size > 0)
        if over or (not free and left != 1):
            asked = {name: size for name, size in sizes.items() if size > 1}
            named = " x ".join(f"{name} {size}" for name, size in asked.items()) or "of one device"
            near = " x ".join(f"{name} {size}" for name, size in nearest_sizes(asked, devices, bool(free)).items())
            nearest = f" (the nearest: {near})" if near else ""
            raise UserError(
                f"the mesh {named} takes {'a multiple of ' if free else ''}{fixed} devices, but there are {devices}; "
                f"choose sizes whose product is {devices}{nearest}, or set one axis to -1"
            )
        return {name: left if size == -1 else size for name, size in sizes.items()}


def nearest_sizes(asked: Mapping[str, int], devices: int, free: bool = False) -> dict[str, int]:
    """Sizes whose product is ``devices``, or divides it if another axis is ``free``, the least off in their ratios."""

    def splits(left: int, count: int) -> Iterator[tuple[int, ...]]:
        for first in (n for n in range(1, left + 1) if left % n == 0):
            yield from ((first, *rest) for rest in splits(left // first, count - 1)) if count > 1 else [(first,)]

    def fits(sizes: tuple[int, ...]) -> bool:
        return free or math.prod(sizes) == devices

    def off(sizes: tuple[int, ...]) -> float:
        return sum(abs(math.log(size / wanted)) for size, wanted in zip(sizes, asked.values(), strict=True))

    found = min(filter(fits, splits(devices, len(asked))), key=off) if asked else ()
    return dict(zip(asked, found, strict=True))


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or those given), with ``Auto`` axes: the compiler propagates the shardings.

    The axes are in the order of their fields, the outermost first: neighbours along the last ones, which talk the
    most, are neighbours in the machine. Only ``slice``, and ``stage`` if it has to, reach across slices.

    From here on this process does without JAX's compilation cache, where that cannot be trusted with such a mesh: see
    :func:`cache_forgets_order`.

    Raises:
      UserError: the sizes do not fit the devices, or ``mesh.slice`` the slices that they are in.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    if cache_forgets_order(devices):
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # which asks for that setting once
    names, shape = tuple(sizes), tuple(sizes.values())
    kinds = (AxisType.Auto,) * len(names)
    found = len({getattr(device, "slice_index", 0) for device in devices})
    # An axis of 8 may lie along two of the machine's 4 x 4 x 4 in part.
    place = functools.partial(create_device_mesh, allow_split_physical_axes=True)
    if found > 1:
        over = across_slices(sizes, found)
        names = tuple(sorted(names, key=lambda name: over.get(name, 1) == 1))  # what reaches across comes first
        shape = tuple(sizes[name] // over.get(name, 1) for name in names)
        across = [over.get(name, 1) for name in names]
        place = functools.partial(create_hybrid_device_mesh, dcn_mesh_shape=across, allow_split_physical_axes=True)
    # Parts of one slice, or virtual devices, can stand for slices.
    return Mesh(place(shape, devices=devices), names, axis_types=kinds)


def across_slices(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """How many of the ways that ``slice`` and ``stage`` split go across so many slices.

    Raises:
      UserError: they cannot cover the slices.
    """
    stages, over = divmod(slices, sizes["slice"])
    if over or sizes["stage"] % stages:
        raise UserError(
            f"the devices are in {slices} slices, but mesh.slice is {sizes['slice']} and mesh.stage {sizes['stage']}; "
            f"set mesh.slice to {slices}, or to 1 and mesh.stage to a multiple of {slices} for a pipeline across them"
        )
    return {"slice": sizes["slice"], "stage": stages}


def cache_forgets_order(devices: Sequence[jax.Device]) -> bool:
    """Whether a program for these devices may stop for ever when it comes from the compilation cache.

    It may on several CPU devices with jaxlib 0.10. Read back from the cache, a program has lost the order of its
    collectives, and two devices may each wait in another one. Compiled anew it keeps them in order; with jaxlib 0.12
    it does so too when it is read back.
    """
    return len(devices) > 1 and devices[0].platform == "cpu" and version("jaxlib").startswith("0.10.")
