"""Rotary positions in a Hugging Face ``config.json``: read in its old and new form, written so that both are read."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, cast

from lmx.config import from_data, nearest
from lmx.errors import UserError
from lmx.nn.position import LinearScaling, Llama3Scaling, LongRope, Rope, RopeScaling, YarnScaling

ORIGINAL = "original_max_position_embeddings"
NAMES = {"original_context": ORIGINAL, "short": "short_factor", "long": "long_factor"}
"""The fields of scalings that Hugging Face calls otherwise."""
COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True)
class Numbers:
    """The rotary numbers of one kind of layer, as ``config.json`` has them.

    Attributes:
      kind: the rope type.
      theta: the base.
      partial: the share of a head that rotates.
      scaling: what is left: the scaling's own numbers.
    """

    kind: str
    theta: float
    partial: float
    scaling: dict[str, Any]


SCALINGS: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "longrope": LongRope,
    "su": LongRope,  # its name in the first Phi-3 checkpoints
}


def read_rope(
    config: Mapping[str, Any], *, head_dim: int, layer_type: str | None = None, theta: float = 10_000.0
) -> Rope:
    """The rotary positions that a ``config.json`` describes.

    Args:
      config: its content: ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` as transformers 4 has them,
        or ``rope_parameters`` as transformers 5 has them, for all layers or by layer type.
      head_dim: the width of what rotates: a head, or its rotary part in multi-head latent attention.
      layer_type: the layers asked for, such as "sliding_attention", where ``rope_parameters`` tells them apart.
      theta: the base where the file gives none.

    Raises:
      UserError: a rope type that is not computed, or a number that is missing, unknown or of the wrong size.
    """
    numbers = _numbers(config, layer_type, theta)
    dims = int(head_dim * numbers.partial)
    if dims % 2 or not 2 <= dims <= head_dim:
        raise UserError(
            f"config.json has partial_rotary_factor {numbers.partial}, so that {dims} of a head's {head_dim} dims "
            "rotate, expected an even number from 2 to all of them"
        )
    scaling = _scaling(config, numbers, dims)
    return Rope(numbers.theta, dims=None if dims == head_dim else dims, scaling=scaling)


def _numbers(config: Mapping[str, Any], layer_type: str | None, theta: float) -> Numbers:
    """Those of the layer type, with the file's own defaults; the inner values come before the outer ones."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in found.values()):
        if layer_type not in found:
            raise UserError(
                f"config.json has rope_parameters for {nearest(str(layer_type), found)}, but not for {layer_type!r}"
            )
        found = found[layer_type] or {}
    given = {key: value for key, value in found.items() if value is not None}
    outer = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    merged = {"rope_theta": theta, "partial_rotary_factor": 1.0, **outer, **given}
    kind = merged.get("rope_type", merged.get("type", "default"))
    own = {key: value for key, value in given.items() if key not in COMMON}
    return Numbers(kind, float(merged["rope_theta"]), float(merged["partial_rotary_factor"]), own)


def _scaling(config: Mapping[str, Any], numbers: Numbers, dims: int) -> RopeScaling | None:
    """The scaling of that kind from its numbers, of which all are checked."""
    if numbers.kind == "default":
        known: dict[str, Any] = {}
    elif numbers.kind in SCALINGS:
        known = {NAMES.get(f.name, f.name): f for f in fields(SCALINGS[numbers.kind])}
    else:
        raise UserError(
            f"config.json has the rope type {numbers.kind!r}, which lmx does not compute; it has default, "
            f"{nearest(numbers.kind, SCALINGS)}"
        )
    unknown = sorted(set(numbers.scaling) - set(known))
    if unknown:
        raise UserError(
            f"config.json has the unknown rotary number {unknown[0]!r} for the rope type {numbers.kind!r}, "
            f"which has {nearest(unknown[0], known) or 'none'}"
        )
    return _built(numbers.kind, _completed(config, known, numbers.scaling), known, dims) if known else None


def _completed(config: Mapping[str, Any], known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers with those that follow from the contexts: Phi-3 has its original context outside of them."""
    values, context = dict(given), config.get("max_position_embeddings")
    if ORIGINAL in known:
        original = config.get(ORIGINAL) or values.get(ORIGINAL) or context
        values |= {ORIGINAL: original} if original else {}
        if context and original:
            values.setdefault("factor", context / original)
    return values


def _built(kind: str, values: Mapping[str, Any], known: Mapping[str, Any], dims: int) -> RopeScaling:
    missing = sorted(key for key, f in known.items() if key not in values and f.default is MISSING)
    if missing:
        raise UserError(f"config.json lacks {missing[0]!r}, which the rope type {kind!r} needs")
    data = {f.name: values.get(key, f.default) for key, f in known.items()}
    scaling = from_data(SCALINGS[kind], data, "the rope scaling in config.json")
    for key, f in known.items():
        factors = getattr(scaling, f.name)
        if isinstance(factors, tuple) and len(factors) != dims // 2:
            raise UserError(
                f"config.json has {len(factors)} numbers in {key}, expected {dims // 2}, half of the {dims} dims that "
                "rotate"
            )
    return cast(RopeScaling, scaling)


def write_rope(rope: Rope, *, head_dim: int, context: int) -> dict[str, Any]:
    """The entries of ``config.json`` from which :func:`read_rope` and transformers 4.5 and 5 read these positions.

    They are in transformers' older form, which the newer one reads too (but for a LongRope whose factor is not
    context / original_context, which transformers 4.5's Phi-3 refuses). How dims pair is the architecture's, and is
    not in the file.

    Args:
      rope: the rotary positions.
      head_dim: as for :func:`read_rope`.
      context: the file's ``max_position_embeddings``.
    """
    entries: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.dims is not None and rope.dims != head_dim:
        share = rope.dims / head_dim
        # Readers round the product down.
        entries["partial_rotary_factor"] = share if int(head_dim * share) == rope.dims else math.nextafter(share, 1)
    if rope.scaling is None:
        return entries
    kind = next(name for name, cls in SCALINGS.items() if type(rope.scaling) is cls)
    values = {f.name: getattr(rope.scaling, f.name) for f in fields(rope.scaling)}
    own = {NAMES.get(key, key): list(v) if isinstance(v, tuple) else v for key, v in values.items() if v is not None}
    if isinstance(rope.scaling, LongRope):
        entries[ORIGINAL] = own.pop(ORIGINAL)
        if own["factor"] == context / rope.scaling.original_context:
            del own["factor"]  # transformers 4.5 takes nothing but the two lists and their type
        return entries | {"rope_scaling": {"type": kind, **own}}
    return entries | {"rope_scaling": {"rope_type": kind, **own}}
