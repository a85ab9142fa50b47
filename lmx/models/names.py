"""Name maps: how a family's parameters are stored in Hugging Face checkpoints, as data."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """The tensor that holds a parameter, and how it lies there.

    A parameter's axes are, in order: ``lead`` that are kept, the inputs (up to ``split``), ``outer`` of the outputs,
    and the other outputs. Parameters of a map that name one tensor lie side by side in it along those, in the map's
    order.

    Attributes:
      name: the tensor's; ``{layer}`` stands for the layer's number, ``{expert}`` for the place on the parameter's
        leading axis, which then is cut into one tensor for each expert.
      split: the axis at which the outputs begin; those before it are joined to one, the inputs. None: no inputs.
      transposed: the tensor is [outputs, inputs].
      lead: 1 if the tensor has an axis of its own for the experts, the leading one.
      outer: the axes of the outputs within which parameters of one tensor take turns. 0: one parameter follows the
        other; 1, of a kernel to heads: one head of each; all: one entry of each.
      also: other names that the tensor has in some checkpoints; it is written as ``name``.
    """

    name: str
    split: int | None = None
    transposed: bool = False
    lead: int = 0
    outer: int = 0
    also: tuple[str, ...] = ()

    def moved(self, old: str, new: str) -> "Stored":
        """The same with another start of the name, by which it is then written; the old name is still read."""
        if old == new or not self.name.startswith(old):
            return self
        return replace(self, name=new + self.name.removeprefix(old), also=(self.name, *self.also))

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the tensor that holds parameters of these shapes."""
        groups = [self._groups(shape) for shape in shapes]
        lead, inputs, outer, _ = groups[0]
        return self._order(lead, inputs, outer * sum(inner for *_, inner in groups))

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor that holds these parameters, a view where it can be one."""
        parts = [array.reshape(self._groups(array.shape)) for array in arrays]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        lead, inputs, outer, inner = joined.shape
        matrix = joined.reshape(lead, inputs, outer * inner)
        matrix = matrix.swapaxes(1, 2) if self.transposed else matrix
        return matrix.reshape(self._order(lead, inputs, outer * inner))

    def cut(self, tensor: np.ndarray, shapes: Sequence[Shape], which: int) -> np.ndarray:
        """One of the parameters in a tensor: the inverse of :meth:`join`, a view where it can be one."""
        ends = np.cumsum([0, *(self._groups(shape)[-1] for shape in shapes)])
        lead, inputs, outer, _ = self._groups(shapes[which])
        turned = tensor.swapaxes(-1, -2) if self.transposed else tensor
        groups = turned.reshape(lead, inputs, outer, ends[-1])
        return groups[..., ends[which] : ends[which + 1]].reshape(shapes[which])

    def read(
        self, tensor: Callable[[slice], np.ndarray], shapes: Sequence[Shape], which: int, box: Sequence[slice]
    ) -> np.ndarray:
        """Part of one of the parameters in a tensor, of which no more rows than that needs are read.

        Args:
          tensor: reads a range of the tensor's rows.
          shapes: of the parameters in it.
          which: the parameter's place among them.
          box: for each of the parameter's axes the range that is wanted, with a start and a stop.
        """
        shape, outputs_first = shapes[which], not self.lead and (self.split is None or self.transposed)
        axis = (self.split or 0) if outputs_first else 0
        if axis == len(shape) or not (outputs_first or self.lead or self.split):  # the tensor's rows are no axis of it
            return self.cut(tensor(slice(None)), shapes, which)[tuple(box)]
        before = 0
        if outputs_first and not self.outer:  # its rows follow each other
            before, shapes, which = sum(math.prod(s[axis:]) for s in shapes[:which]), [shape], 0
        row, start, stop = self.shape(shapes)[0] // shape[axis], box[axis].start, box[axis].stop
        rows = tensor(slice(before + start * row, before + stop * row))
        shorter = [(*s[:axis], stop - start, *s[axis + 1 :]) for s in shapes]
        return self.cut(rows, shorter, which)[(*box[:axis], slice(None), *box[axis + 1 :])]

    def _groups(self, shape: Shape) -> tuple[int, int, int, int]:
        """A parameter's shape as [lead, inputs, outer, the rest]."""
        first = self.lead if self.split is None else self.split
        inner = first + self.outer
        lead, inputs, outer = shape[: self.lead], shape[self.lead : first], shape[first:inner]
        return math.prod(lead), math.prod(inputs), math.prod(outer), math.prod(shape[inner:])

    def _order(self, lead: int, inputs: int, outputs: int) -> Shape:
        matrix = (outputs,) if self.split is None else (outputs, inputs) if self.transposed else (inputs, outputs)
        return (lead, *matrix) if self.lead else matrix


@dataclass(frozen=True)
class NameMap:
    """A family's map.

    Attributes:
      stored: by the parameter's name; the layers' parameters are called ``layer/...`` whatever their segment, those of
        an encoder ``encoder/layer/...``.
      ignored: patterns of tensors that hold nothing more: buffers, and the output table where it is tied.
      base: the start of the names of a model's tensors that a checkpoint without heads lacks (``bert.``).
      renames: patterns of ``re`` and what to put for them, to bring older or longer names to these.
      tasks: by task, what is stored elsewhere by the class for it.
      bases: by task, the base by another name, which the class for it has; the bare model has none.
    """

    stored: Mapping[str, Stored] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    base: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    tasks: Mapping[str, Mapping[str, Stored]] = field(default_factory=dict)
    bases: Mapping[str, str] = field(default_factory=lambda: {"embedding": ""})

    def for_task(self, task: str) -> "NameMap":
        """The map of the class for a task."""
        base = self.bases.get(task, self.base)
        stored = {**self.stored, **self.tasks.get(task, {})}
        return replace(self, stored={path: s.moved(self.base, base) for path, s in stored.items()}, base=base)

    def readings(self, name: str) -> tuple[str, str]:
        """What a checkpoint's name may mean: the tensor of this name, or of the base model's."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name, self.base + name


def vector(name: str, *also: str, outer: int = 0) -> Stored:
    """A scale or a bias; the axes of heads are joined."""
    return Stored(name, also=also, outer=outer)


def row(name: str, *also: str) -> Stored:
    """A vector that is stored as a matrix of one row."""
    return Stored(name, split=0, also=also)


def table(name: str, *also: str) -> Stored:
    """Rows of embeddings, stored as they are."""
    return Stored(name, split=1, also=also)


def linear(name: str, *also: str, inputs: int = 1, outer: int = 0) -> Stored:
    """A kernel whose first ``inputs`` axes are summed over, stored [out, in] as ``torch.nn.Linear`` does.

    ``outer`` is that of :class:`Stored`: how this kernel and others in the tensor take turns along the outputs.
    """
    return Stored(name, split=inputs, transposed=True, outer=outer, also=also)


def conv1d(name: str, *also: str, inputs: int = 1, outer: int = 0) -> Stored:
    """A kernel whose first ``inputs`` axes are summed over, stored [in, out] as GPT-2's ``Conv1D`` does."""
    return Stored(name, split=inputs, outer=outer, also=also)


def stacked(one: Stored) -> Stored:
    """The same for all experts in one tensor; without it, a name with ``{expert}`` is of one tensor for each expert."""
    return replace(one, lead=1, split=None if one.split is None else one.split + 1)
