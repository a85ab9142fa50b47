"""What a compiled program sends between devices, by the axes of the mesh: read from the text of its optimized HLO.

Counted is what one device sends with ring algorithms (Thakur et al. 2005, "Optimization of collective communication
operations in MPICH"), of operands of B bytes on each of the n devices of a group:

- all-reduce: 2 (n - 1) / n * B
- all-gather: (n - 1) * B
- reduce-scatter, all-to-all: (n - 1) / n * B
- collective-permute, collective-broadcast: B
- ragged-all-to-all: (n - 1) / n * B, as if the smaller buffer's rows were all in use and evenly spread

A loop's body counts as often as it runs. What kernels of other makers (Pallas) send inside is not in the text.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lmx.errors import LmxError
from lmx.sharding.replica_groups import replica_groups

SENT = {
    "all-reduce": lambda n, size: 2 * (n - 1) / n * size,
    "all-gather": lambda n, size: (n - 1) * size,
    "reduce-scatter": lambda n, size: (n - 1) / n * size,
    "all-to-all": lambda n, size: (n - 1) / n * size,
    "ragged-all-to-all": lambda n, size: (n - 1) / n * size,
    "collective-permute": lambda n, size: size,
    "collective-broadcast": lambda n, size: size,
}
"""By the kind of collective: the bytes that one of ``n`` devices sends, of its operands' ``size`` in bytes."""

RARE = "rarely"
"""The name of a ``jax.named_scope`` for work that a program hardly ever does: its loops count as if they never ran."""
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ?([a-z][a-z\d-]*)\((.*)$")
CALLED = {
    "call": "to_apply",
    "fusion": "calls",
    "async-start": "calls",
    "call-start": "to_apply",  # on a TPU's SparseCores
    "while": "body",
    "conditional": "branch_computations|true_computation|false_computation",
}
"""Where an instruction names the computations that it runs."""
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
      kind: as HLO names it: ``all-reduce``, ``all-gather``, ...
      axes: the mesh axes that its groups reach along, in the mesh's order.
      devices: how many a group has.
      sent: bytes that one device sends each time.
      times: how often it runs in one run of the program.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    sent: float
    times: int

    @property
    def total(self) -> float:
        """Bytes that one device sends in one run of the program."""
        return self.sent * self.times


@dataclass(frozen=True)
class Instruction:
    """A line of HLO: its opcode, its result's size in bytes, what stands in its parentheses, and what follows."""

    opcode: str
    size: float
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of instructions."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    @property
    def called(self) -> list[str]:
        """The computations that run where it stands, one of them each time; what reduces two numbers is none."""
        named = CALLED.get(self.opcode)
        found = re.findall(rf"\b(?:{named})=(\{{[^}}]*\}}|%[\w.-]+)", self.attributes) if named else []
        return [name for each in found for name in re.findall(r"%([\w.-]+)", each)]


Program = dict[str, dict[str, Instruction]]
"""The instructions by name, by the name of their computation; the entry's is empty."""


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives that one device takes part in, of groups of more than one device.

    Of a conditional's branches the one that sends most counts.

    Args:
      text: ``compiled.as_text()`` of what ``jax.jit`` made for all devices of one mesh.
      mesh: that mesh's axes and their sizes (``mesh.shape``).

    Raises:
      LmxError: the text has groups of an unknown form, or collectives in a loop that does not tell how often it runs.
    """
    return _walk(_parse(text), "", mesh)


def bytes_by_axes(found: Iterable[Collective]) -> dict[str, int]:
    """Bytes that one device sends in one run, by mesh axis; ``data+fsdp`` is along both at once, the most first."""
    sums: dict[str, float] = {}
    for collective in found:
        name = "+".join(collective.axes)
        sums[name] = sums.get(name, 0) + collective.total
    return {name: round(total) for name, total in sorted(sums.items(), key=lambda item: -item[1])}


def _parse(text: str) -> Program:
    program: Program = {}
    body: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            body = program.setdefault("" if header[1] else header[2], {})
        elif found := INSTRUCTION.match(line):
            name, shape, opcode, rest = found.groups()
            end = _closing(rest)
            body[name] = Instruction(opcode, _size(shape), rest[:end], rest[end:])
    return program


def _closing(rest: str) -> int:
    """Where the parenthesis closes that is open at the start."""
    depths = itertools.accumulate((char == "(") - (char == ")") for char in rest)
    return next((at for at, depth in enumerate(depths) if depth < 0), len(rest))


def _size(shape: str) -> float:
    """Bytes of all arrays in a shape."""
    arrays = ARRAY.findall(shape)
    return sum(int(bits or 8) / 8 * math.prod(map(int, filter(None, dims.split(",")))) for _, bits, dims in arrays)


def _walk(program: Program, name: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a computation and of all that it runs."""
    found: list[Collective] = []
    for instruction in program[name].values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in SENT:
            found += _collective(kind, instruction, program[name], mesh)
        inside = [_walk(program, called, mesh) for called in instruction.called]
        most = max(inside, key=lambda each: sum(c.total for c in each), default=[])
        times = _trips(program, instruction) if most and instruction.opcode == "while" else 1
        found += [replace(each, times=each.times * times) for each in most]
    return found


def _collective(
    kind: str, instruction: Instruction, body: Mapping[str, Instruction], mesh: Mapping[str, int]
) -> list[Collective]:
    groups = replica_groups(instruction.attributes, math.prod(mesh.values()))
    axes = tuple(axis for axis, moves in zip(mesh, _reach(groups, tuple(mesh.values())), strict=True) if moves)
    sizes = [body[name].size for name in instruction.operands]
    # A ragged exchange goes from one buffer to another: rows that are sent are in both.
    size, devices = min(sizes[:2]) if kind == "ragged-all-to-all" else sum(sizes), max(map(len, groups), default=1)
    return [Collective(kind, axes, devices, SENT[kind](devices, size), 1)] if axes else []


def _reach(groups: list[list[int]], shape: tuple[int, ...]) -> list[bool]:
    """For each axis of the mesh: whether a group has devices at several places along it."""
    places = [np.unravel_index(np.array(group), shape) for group in groups]
    return [any(bool(np.ptp(at[axis])) for at in places) for axis in range(len(shape))]


def _trips(program: Program, loop: Instruction) -> int:
    """How often a loop runs: as the compiler says, or from the constant that its condition counts up to from zero and
    the step of its counter."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    if f"/{RARE}/" in loop.attributes:
        return 0
    condition, body = (re.findall(rf"\b{name}=%([\w.-]+)", loop.attributes)[0] for name in ("condition", "body"))
    bodies = [condition, *(called for i in program[condition].values() for called in i.called)]
    constants = [i.arguments for name in bodies for i in program[name].values() if i.opcode == "constant"]
    counts = [int(value) for value in constants if value.isdecimal()]
    if len(counts) != 1:
        raise LmxError(f"the loop with the condition {condition} has collectives, but does not tell how often it runs")
    return -(-counts[0] // _step(program[condition], program[body]))


def _step(condition: Mapping[str, Instruction], body: Mapping[str, Instruction]) -> int:
    """What a loop's body adds to the counter that its condition reads, where they say so; 1 elsewhere."""
    read = [re.search(r"index=(\d+)", i.attributes) for i in condition.values() if i.opcode == "get-tuple-element"]
    counters = {int(found[1]) for found in read if found}
    if len(counters) != 1:
        return 1
    added = body.get(list(body.values())[-1].operands[counters.pop()])
    steps = [body[name].arguments for name in added.operands if name in body] if added and added.opcode == "add" else []
    return next((int(step) for step in steps if step.isdecimal()), 1)
