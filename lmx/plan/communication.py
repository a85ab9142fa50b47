"""What one device sends in a train step, by formula: what a compiled step is held against.

Bytes are counted as :mod:`lmx.sharding.collectives` counts them, of ring algorithms. Along an axis of n devices, with P
bytes of parameters and A bytes of a device's hidden states, all in the dtype of the matrix products:

- data: all-reduce of gradients, ``2 P (n - 1) / n`` (Rajbhandari et al. 2020, ZeRO, 7.1).
- fsdp: all-gather of parameters forward and backward, reduce-scatter of gradients: ``3 P (n - 1) / n`` (ZeRO, 7.2). The
  vocabulary's tables are gathered once, because the gradient of the logits is formed beside them.
- tensor: in each layer two all-reduces of A forward and two backward, ``8 A (n - 1) / n`` (Shoeybi et al. 2019,
  Megatron-LM, 3); the lookup's forward and the logits' backward take one each.
- sequence, ring: in each layer keys and values go round forward, and backward with their gradients, which are float32
  and go home at last: ``2 (n - 1) KV + n G`` with the bytes KV of a shard's keys and values, and G of those in float32
  (Liu et al. 2023, Ring Attention, 3.1). What a window cannot reach does not come by. Under a causal mask queries Q,
  keys, values and what attention gives, O, change into the balanced order or back, and backward again:
  ``2 (Q + KV + O)``.
- expert: in each layer k rows a token go to their experts and back, forward and backward: ``4 k A (n - 1) / n``
  (Lepikhin et al. 2020, GShard, 3.2).
- stage: each tick hands on a microbatch's hidden states, forward and backward (Narayanan et al. 2021, 3.1). Stages
  share the rows outside of the pipeline: what enters is gathered, what leaves scattered, and backward (on CPU in
  float32).

Axes that cut tokens and not a parameter share the all-reduce of its gradient. Left out is what is small (scalars,
positions, loads), and what is computed again to save memory: hold it against ``train.remat none``.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax

from lmx.errors import UserError
from lmx.experiment import Experiment
from lmx.kernels.itinerary import Trip, pieces_of, plan
from lmx.models.model import param_axes
from lmx.models.specs import ModelSpec
from lmx.nn.attention import SelfAttention
from lmx.nn.moe import Moe
from lmx.nn.sublayer import Sublayer
from lmx.sharding.rules import Sharding
from lmx.train.state import pipeline_plan, state_shapes

Axes = tuple[str, ...]
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Term:
    """Bytes that one device sends along mesh axes in a step, and of what."""

    axes: Axes
    bytes: float
    what: str


@dataclass(frozen=True)
class Compared:
    """Along mesh axes (``data+fsdp``: along both at once), the bytes that one device sends in a step: of the compiled
    step, and by formula; and what that says it is."""

    axes: str
    measured: int
    formula: int
    what: str


def expected(experiment: Experiment, sharding: Sharding) -> tuple[Term, ...]:
    """The terms of a step along axes of more than one device.

    Raises:
      UserError: the model has an encoder and a decoder, or steps accumulate, which the formulas do not cover.
    """
    if experiment.model.spec().encoder is not None or experiment.train.accumulate > 1:
        raise UserError(
            "the formulas of communication are of models of one stack and of steps without accumulation; "
            "set train.accumulate to 1, or ask for no formulas"
        )
    step = _Step(experiment, sharding)
    terms = [*step.gradients(), *step.weights(), *step.hidden_states(), *step.layers(), *step.stages()]
    return tuple(term for term in terms if term.axes and term.bytes)


def compared(measured: Mapping[str, int], terms: tuple[Term, ...]) -> tuple[Compared, ...]:
    """Side by side, what is most first."""
    formula: dict[str, float] = {}
    what: dict[str, set[str]] = {}
    for term in terms:
        name = "+".join(term.axes)
        formula[name] = formula.get(name, 0.0) + term.bytes
        what.setdefault(name, set()).add(term.what)
    names = dict.fromkeys((*measured, *formula))
    rows = [
        Compared(name, measured.get(name, 0), round(formula.get(name, 0)), ", ".join(sorted(what.get(name, ()))))
        for name in names
    ]
    return tuple(sorted(rows, key=lambda row: -max(row.measured, row.formula)))


@dataclass(frozen=True)
class _Step:
    """One experiment's step on one mesh."""

    experiment: Experiment
    sharding: Sharding

    @functools.cached_property
    def spec(self) -> ModelSpec:
        return self.experiment.model.spec()

    @property
    def token_axes(self) -> set[str]:
        """The axes that cut the tokens."""
        return {*self.sharding.axes("act_batch"), *self.sharding.axes("act_length")}

    def tokens(self, without: str = "") -> float:
        """Tokens of a device; of all of them along the axis ``without``."""
        train = self.experiment.train
        return train.batch * train.length / self.ways(self.token_axes - {without})

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.experiment.train.compute]

    def ways(self, axes: set[str]) -> int:
        return math.prod(self.sharding.mesh.shape[a] for a in axes)

    def term(self, axes: set[str], times: float, size: float, what: str) -> Term:
        """``times`` all-gathers to ``size`` bytes, or reduce-scatters or exchanges of them."""
        n = self.ways(axes)
        return Term(tuple(a for a in self.sharding.mesh.axis_names if a in axes), times * (n - 1) / n * size, what)

    def leaves(self) -> Iterator[tuple[str, float, set[str], set[str]]]:
        """Of each parameter: its path, a device's bytes, the axes that cut it, and those of them to gather it over."""
        named = jax.tree.leaves(param_axes(self.spec), is_leaf=lambda a: isinstance(a, tuple))
        shapes = jax.tree.leaves_with_path(state_shapes(self.experiment).params)
        for (path, shape), names in zip(shapes, named, strict=True):
            by_name = {name: set(self.sharding.axes(name)) for name in names if name}
            cut = {a for axes in by_name.values() for a in axes}
            own = by_name.get("expert", set()) | by_name.get("layers", set())
            size = shape.size * self.itemsize / self.ways(cut)
            yield jax.tree_util.keystr(path, simple=True, separator="/"), size, cut, (cut & self.token_axes) - own

    def gradients(self) -> Iterator[Term]:
        """All-reduces over the axes that cut tokens and not the parameter."""
        for _, size, cut, _ in self.leaves():
            yield self.term(self.token_axes - cut, 2, size, "gradients")

    def weights(self) -> Iterator[Term]:
        """Gathers of parameters that are cut along axes of the tokens, and scatters of their gradients."""
        for path, size, _, gathered in self.leaves():
            times = 3 if path.startswith("stack/") else 2
            yield self.term(gathered, times, size * self.ways(gathered), "parameters, gradients")

    def hidden_states(self) -> Iterator[Term]:
        """All-reduces where a product contracts what is cut."""
        count = 2 * len(self.sublayers()) + 2
        axes = set(self.sharding.axes("act_mlp")) - self.token_axes
        yield self.term(axes, 2 * count, self.tokens() * self.spec.width * self.itemsize, "hidden states")

    def sublayers(self) -> list[Sublayer]:
        return [part for block in self.spec.stack.blocks() for part in block.parts]

    def layers(self) -> Iterator[Term]:
        """What attention and experts exchange."""
        length, expert = set(self.sharding.axes("act_length")), set(self.sharding.axes("expert"))
        for part in self.sublayers():
            if isinstance(part, SelfAttention) and length and self.sharding.rules.sequence_attention == "ring":
                yield self.ring(part, length)
            if isinstance(part, Moe):
                rows = part.router.k * self.tokens() * self.spec.width * self.itemsize
                yield self.term(expert, 4, rows, "rows of experts")

    def ring(self, part: SelfAttention, axes: set[str]) -> Term:
        """Keys and values on their way, and what changes into the balanced order and back."""
        shard = self.experiment.train.length // self.ways(axes)
        pieces = pieces_of(shard)
        course = plan(Trip(part.mask, self.ways(axes), pieces, pieces, shard // pieces, gathered=False))
        hops = course.steps[-1].offset
        keys = 2 * self.tokens() * part.kv_heads * part.head_dim / self.sharding.ways("act_kv_heads")
        queries = 2 * self.tokens() * part.heads * part.head_dim / self.sharding.ways("act_heads")
        around = 2 * hops * keys * self.itemsize + (hops + bool(hops)) * keys * ITEMSIZE["float32"]
        balanced = 2 * (queries + keys) * self.itemsize if course.zigzag else 0
        return Term(tuple(a for a in self.sharding.mesh.axis_names if a in axes), around + balanced, "keys and values")

    def stages(self) -> Iterator[Term]:
        """Microbatches from stage to stage, forward and backward, and into and out of the pipeline."""
        pipeline = pipeline_plan(self.experiment, self.sharding)
        if pipeline is not None:
            hidden = self.tokens(without="stage") * self.spec.width
            handed = 2 * pipeline.ticks * hidden * self.itemsize / pipeline.microbatches
            yield Term(("stage",), handed, "microbatches")
            summed = ITEMSIZE["float32"] if self.sharding.on_cpu else self.itemsize
            yield self.term({"stage"}, 4, hidden * summed, "rows of the pipeline")
