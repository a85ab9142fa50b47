"""Which parameters are the hidden matrices of a stack, told by their logical axes."""

from dataclasses import dataclass

from lmx.sharding.rules import LogicalAxes

HEADS = ("heads", "kv_heads")
BATCHED = ("expert",)
"""Leading axes, after the layers, of which each entry has a matrix of its own."""


@dataclass(frozen=True)
class Matrix:
    """How a parameter's axes make matrices: ``lead`` axes of layers and experts, then inputs, then outputs.

    The kernel [layers, embed, heads, head_dim] is a matrix [embed, heads * head_dim] for each layer: lead 1, inputs 1,
    outputs 2.
    """

    lead: int
    inputs: int
    outputs: int

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The numbers of the input axes."""
        return tuple(range(self.lead, self.lead + self.inputs))

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The numbers of the output axes."""
        return tuple(range(self.lead + self.inputs, self.lead + self.inputs + self.outputs))


def matrix_of(name: str, axes: LogicalAxes) -> Matrix | None:
    """The matrices that a parameter is, or None if it is not a hidden matrix of a stack.

    Tables, heads and whatever belongs to a whole stack lie outside its segments; scales and biases have one side only;
    a router's outputs have no logical axis.
    """
    if "stack/segment_" not in name:
        return None
    lead = 1 + sum(axis in BATCHED for axis in axes[1:2])
    sides: list[int] = []
    for i, axis in enumerate(axes[lead:], lead):
        if axis == "head_dim" and axes[i - 1] in HEADS:
            sides[-1] += 1
        elif axis is None or axis in BATCHED:
            return None
        else:
            sides.append(1)
    return Matrix(lead, *sides) if len(sides) == 2 else None
