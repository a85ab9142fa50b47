"""Layouts by name: a mesh and the rules that go with it, for those who do not want to write a table.

The sizes are starting points: ``-1`` takes the devices that are left, ``-8`` up to 8 of them (what one host often
has), and ``--mesh.AXIS N`` beside the name sets any of them.

The serving layouts are those of Pope et al. 2022 ("Efficiently Scaling Transformer Inference", section 3), whose X, Y
and Z are the mesh axes ``fsdp``, ``sequence`` and ``tensor``. All of them store the parameters in the same way, so that
prompts may be read with one layout and tokens written with another without moving a weight (section 3.5).
"""

from dataclasses import dataclass, field, replace

from lmx.errors import UserError
from lmx.sharding.mesh import MeshConfig
from lmx.sharding.rules import Rules


@dataclass(frozen=True)
class Layout:
    """A mesh and its rules.

    Attributes:
      when: a sentence that says when to use it.
      mesh: the sizes, as far as they are fixed.
      rules: what is split by which axis.
    """

    when: str
    mesh: MeshConfig
    rules: Rules = field(default_factory=Rules)


ROWS = ("slice", "data", "expert")
X, YZ = ("fsdp",), ("sequence", "tensor")
STORED = Rules(
    embed=X,
    mlp=YZ,
    heads=YZ,
    kv_heads=YZ,
    vocab=YZ,
    layers=(),
    act_length=(),
    act_residual=(),
    act_expert_batch=("slice", "data"),
    act_cache_length=(),
)
"""How the serving layouts lay the parameters, and what they have in common: lengths are whole."""


def _serving(batch: tuple[str, ...], split: tuple[str, ...], embed: tuple[str, ...] = (), mqa: bool = False) -> Rules:
    """A serving layout: the mesh axes of the batch, of heads, hidden units and vocabulary, and of the residual stream.

    ``mqa`` splits attention over the batch by every axis, and no longer over heads (Pope et al. 2022, 3.3).
    """
    kv = () if mqa else split
    return replace(
        STORED,
        kv_heads=() if mqa else YZ,
        act_batch=ROWS + batch,
        act_expert_batch=tuple(axis for axis in ROWS if axis != "expert") + batch,
        act_embed=embed,
        act_heads=split,
        act_kv_heads=kv,
        act_mlp=split,
        act_vocab=split,
        act_cache_batch=ROWS + X + YZ if mqa else ROWS + batch,
        act_cache_heads=kv,
        act_cache_kv_heads=kv,
    )


TRAINING = {
    "ddp": Layout(
        "Every device holds the whole model and the optimizer's state: for models that fit one device several times.",
        MeshConfig(data=-1),
    ),
    "fsdp": Layout(
        "Parameters, gradients and optimizer state are split over all devices, gathered layer by layer (ZeRO 3): the "
        "first choice for models that do not fit one device.",
        MeshConfig(data=1, fsdp=-1),
    ),
    "hsdp": Layout(
        "fsdp within groups of up to 8 devices, data parallel between them: where the network between hosts is slow.",
        MeshConfig(data=-1, fsdp=-8),
    ),
    "megatron": Layout(
        "Tensor parallel within up to 8 devices, the norms split over the length (Korthikanti et al. 2022), and data "
        "parallel between them: for wide layers and fast links within a host.",
        MeshConfig(data=-1, tensor=-8),
        Rules(act_residual=("sequence", "tensor")),
    ),
    "2d": Layout(
        "fsdp and, within up to 4 devices, megatron: for large models on many devices, where fsdp alone would leave "
        "less than a row of the batch for each.",
        MeshConfig(data=1, fsdp=-1, tensor=-4),
        Rules(act_residual=("sequence", "tensor")),
    ),
    "3d": Layout(
        "A pipeline of 2 stages, each laid out as 2d: for models that 2d cannot hold, or links too slow for fsdp "
        "between hosts; the layers must divide.",
        MeshConfig(data=1, fsdp=-1, stage=-2, tensor=-2),
        Rules(act_residual=("sequence", "tensor")),
    ),
    "context": Layout(
        "Lengths split over up to 4 devices with ring attention, and fsdp: for rows too long for one device.",
        MeshConfig(data=1, fsdp=-1, sequence=-4),
    ),
    "ulysses": Layout(
        "As context, but heads are exchanged for lengths (Jacobs et al. 2023): less traffic where the heads divide.",
        MeshConfig(data=1, fsdp=-1, sequence=-4),
        Rules(sequence_attention="all_to_all"),
    ),
    "expert": Layout(
        "Experts split over up to 8 devices, and fsdp: for mixtures of experts.",
        MeshConfig(data=1, fsdp=-1, expert=-8),
    ),
}
"""Layouts for training; all but those with stages are fine for inference too."""

SERVING = {
    "1d_weight_stationary": Layout(
        "Weights stay, split over heads and hidden units by all devices; activations are summed after each sublayer: "
        "the lowest latency on few devices.",
        MeshConfig(data=1, tensor=-1),
        _serving((), YZ),
    ),
    "2d_weight_stationary": Layout(
        "Weights stay, split by the residual width too, so that sums go over fewer devices: the lowest latency on many "
        "(from about 16; best with mesh.fsdp at half the square root of their number).",
        MeshConfig(data=1, fsdp=-2, tensor=-1),
        _serving((), YZ, X),
    ),
    "weight_gathered_x": Layout(
        "The batch is split over fsdp and weights are gathered over it; tensor parallel over the rest: for reading "
        "prompts in batches.",
        MeshConfig(data=1, fsdp=-2, tensor=-1),
        _serving(X, YZ),
    ),
    "weight_gathered_xy": Layout(
        "As weight_gathered_x, over fsdp and sequence: for larger batches of prompts.",
        MeshConfig(data=1, fsdp=-2, sequence=-2, tensor=-1),
        _serving((*X, "sequence"), ("tensor",)),
    ),
    "weight_gathered_xyz": Layout(
        "The batch is split over all devices and only weights travel: the best throughput, for the largest batches of "
        "prompts.",
        MeshConfig(data=1, fsdp=-2, tensor=-1),
        _serving(X + YZ, ()),
    ),
    "1d_weight_stationary_mqa": Layout(
        "1d_weight_stationary with attention split over the batch: for one or few key heads, whose cache each device "
        "would hold whole otherwise; the batch must fill the devices.",
        MeshConfig(data=1, tensor=-1),
        _serving((), YZ, mqa=True),
    ),
    "2d_weight_stationary_mqa": Layout(
        "2d_weight_stationary with attention split over the batch.",
        MeshConfig(data=1, fsdp=-2, tensor=-1),
        _serving((), YZ, X, mqa=True),
    ),
    "weight_gathered_x_mqa": Layout(
        "weight_gathered_x with attention split over the batch.",
        MeshConfig(data=1, fsdp=-2, tensor=-1),
        _serving(X, YZ, mqa=True),
    ),
    "weight_gathered_xy_mqa": Layout(
        "weight_gathered_xy with attention split over the batch.",
        MeshConfig(data=1, fsdp=-2, sequence=-2, tensor=-1),
        _serving((*X, "sequence"), ("tensor",), mqa=True),
    ),
    "weight_gathered_xyz_mqa": Layout(
        "weight_gathered_xyz for one or few key heads, which no axis splits.",
        MeshConfig(data=1, fsdp=-2, tensor=-1),
        _serving(X + YZ, (), mqa=True),
    ),
}
"""Layouts for inference."""

LAYOUTS = TRAINING | SERVING


def find_layout(name: str) -> Layout:
    """The layout of this name. Raises UserError, with the list, for another."""
    if name not in LAYOUTS:
        raise UserError(f"there is no layout {name!r}; the layouts are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
