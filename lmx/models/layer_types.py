"""Local and global layers in turn: which of them see a window only, as Hugging Face's ``layer_types`` lists them."""

from collections.abc import Callable, Mapping
from typing import Any

from lmx.errors import UserError

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def is_global(layer: int, period: int) -> bool:
    """Whether a layer, counted from 0, sees everything: each ``period``-th does; with period 0 none does.

    The period is 2 in Gemma 2 and GPT-OSS, and 6 in Gemma 3.
    """
    return period > 0 and (layer + 1) % period == 0


def layer_types(layers: int, period: int) -> list[str]:
    """The list in ``config.json``."""
    return [GLOBAL if is_global(layer, period) else LOCAL for layer in range(layers)]


def read_period(config: Mapping[str, Any], default: int) -> int:
    """The period in a ``config.json``; ``default`` where it lists no layers, or those of that period.

    Raises:
      UserError: a list that is not of ``num_hidden_layers`` layers, or has no period.
    """
    layers, listed = config["num_hidden_layers"], config.get("layer_types")
    if listed is None:
        return default
    first = listed.index(GLOBAL) + 1 if GLOBAL in listed else 0
    for period in (default, first):
        if list(listed) == layer_types(layers, period):
            return period
    raise UserError(
        f"config.json has the layer_types {listed}, which lmx does not compute: expected {layers} of them, "
        f"{GLOBAL!r} at regular distances and {LOCAL!r} elsewhere"
    )


def local_layers(config: Mapping[str, Any], otherwise: Callable[[int], bool]) -> tuple[int, ...]:
    """The layers that a ``config.json`` lists as local; where it lists none, those that ``otherwise`` holds for.

    Raises:
      UserError: a list that is not of ``num_hidden_layers`` layers, or has other kinds of them.
    """
    layers, listed = range(config["num_hidden_layers"]), config.get("layer_types")
    if listed is None:
        return tuple(filter(otherwise, layers))
    if len(listed) != len(layers) or not {*listed} <= {LOCAL, GLOBAL}:
        raise UserError(f"config.json has layer_types {listed}, expected {len(layers)} times {GLOBAL!r} or {LOCAL!r}")
    return tuple(layer for layer in layers if listed[layer] == LOCAL)
