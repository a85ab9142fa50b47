"""How PEFT stores the adapters of single modules: of linear ones, and of tables of tokens."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lmx.adapters.adapter import LEAVES
from lmx.checkpoint.huggingface.plan import Holder
from lmx.checkpoint.huggingface.tensors import InFiles
from lmx.errors import UserError

PREFIX = "base_model.model."
LINEAR = ("lora_A.weight", "lora_B.weight")
TABLE = ("lora_embedding_A", "lora_embedding_B")
LENGTHS = "lora_magnitude_vector"
Arrays = dict[str, np.ndarray]
"""An adapter's: ``a``, ``b`` and DoRA's ``magnitude``."""


@dataclass(frozen=True)
class Module(abc.ABC):
    """A module of transformers that has an adapter: one tensor of the base, and the parameters side by side in it.

    Attributes:
      holder: the base's tensor.
      own: for each of the tensor's parameters its adapter's arrays of this layer, or None where it has none.
    """

    holder: Holder
    own: tuple[Arrays | None, ...]

    @property
    def name(self) -> str:
        """As transformers has it."""
        return self.holder.name.removesuffix(".weight")

    @property
    def rank(self) -> int:
        """Of all of its parameters' adapters together."""
        return sum(own["a"].shape[-1] for own in self.own if own)

    @abc.abstractmethod
    def arrays(self) -> Arrays:
        """PEFT's own: A [rank, inputs], B [outputs, rank], and DoRA's lengths [outputs], by their names."""

    def tensors(self) -> Arrays:
        """The same by the names that they have in a file."""
        return {f"{PREFIX}{self.name}.{name}": np.ascontiguousarray(array) for name, array in self.arrays().items()}


class Linear(Module):
    """Parameters that lie side by side in a tensor have blocks of the rank each."""

    def arrays(self) -> Arrays:
        """See :class:`Module`."""
        a = [own["a"].reshape(-1, own["a"].shape[-1]).T for own in self.own if own]
        b = [self._columns(i, own["b"]) for i, own in enumerate(self.own) if own]
        found = dict(zip(LINEAR, (np.concatenate(a), np.concatenate(b, axis=1)), strict=True))
        lengths = [own["magnitude"] for own in self.own if own and "magnitude" in own]
        if lengths:
            if len(lengths) < len(self.own):
                raise UserError(
                    f"PEFT has one adapter for {self.name}, but DoRA was trained on a part of it; name all of its "
                    "parts in adapter.targets"
                )
            found[LENGTHS] = replace(self.holder.stored, split=None).join(lengths)
        return found

    def _columns(self, which: int, b: np.ndarray) -> np.ndarray:
        """[outputs of the tensor, rank] of one parameter's b, with zeros for its neighbours."""
        shapes = [(b.shape[0], *_outputs(self.holder, i)) for i in range(len(self.own))]
        stored = replace(self.holder.stored, split=1)
        joined = stored.join([b if i == which else np.zeros(shape, b.dtype) for i, shape in enumerate(shapes)])
        return joined if stored.transposed else joined.T


class Table(Module):
    """A table of tokens [vocab, embed]: an embedding, or a linear module of which tokens are the outputs."""

    def arrays(self) -> Arrays:
        """See :class:`Module`; without the padding of the vocabulary."""
        (own,) = self.own
        assert own is not None
        a, b = own["a"][: self.holder.shape[0]], own["b"]
        names, pair = (LINEAR, (b, a)) if is_head(self.holder) else (TABLE, (a.T, b.T))
        return dict(zip(names, pair, strict=True))


def is_table(holder: Holder) -> bool:
    """Whether a tensor is a table of tokens."""
    return holder.places[0].path.endswith("/table")


def is_head(holder: Holder) -> bool:
    """Whether a table is that of the prediction alone."""
    return holder.places[0].path.endswith("head/table")


def module_of(holder: Holder, own: tuple[Arrays | None, ...]) -> Module:
    """A tensor's module, of its kind."""
    return (Table if is_table(holder) else Linear)(holder, own)


def found_pair(tensors: InFiles, module: str) -> tuple[np.ndarray, np.ndarray] | None:
    """PEFT's A [rank, inputs] and B [outputs, rank] of a module, float32; None where it has none."""
    for names in (LINEAR, TABLE):
        keys = [f"{PREFIX}{module}.{name}" for name in names]
        if keys[0] in tensors:
            a, b = (np.asarray(tensors.read(key), np.float32) for key in keys)
            return a, b
    return None


def table_arrays(holder: Holder, a: np.ndarray, b: np.ndarray) -> Arrays:
    """A table's adapter out of a module's A and B, without the padding of the vocabulary."""
    return {"a": b, "b": a} if is_head(holder) else {"a": a.T, "b": b.T}


def linear_arrays(holder: Holder, which: int, a: np.ndarray, b: np.ndarray, lengths: np.ndarray | None) -> Arrays:
    """One parameter's adapter out of a module's."""
    stored, rank, shape = holder.stored, a.shape[0], holder.places[which].shape
    split = stored.split or 0
    outputs = [(rank, *_outputs(holder, i)) for i in range(len(holder.places))]
    found = {
        "a": a.T.reshape(*shape[:split], rank),
        "b": replace(stored, split=1).cut(b if stored.transposed else b.T, outputs, which),
    }
    if lengths is not None:
        flat_ = np.asarray(lengths, np.float32).reshape(-1)
        found["magnitude"] = replace(stored, split=None, transposed=False).cut(flat_, [o[1:] for o in outputs], which)
    return found


def _outputs(holder: Holder, which: int) -> tuple[int, ...]:
    """The output axes of a parameter in a tensor."""
    return holder.places[which].shape[holder.stored.split or 0 :]


def arrays_at(arrays: Mapping[str, np.ndarray], path: str, at: tuple[int, ...]) -> Arrays | None:
    """An adapter's arrays of one layer; None where a parameter has none."""
    return {leaf: arrays[f"{path}/{leaf}"][at] for leaf in LEAVES if f"{path}/{leaf}" in arrays} or None
