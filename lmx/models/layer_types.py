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


def local_layers(config: Mapping[str, Any], otherwise: Callable[[int], bool]) -> tuple[int, ...]:
    """The local layers, counted from 0, in a ``config.json``: listed, or if it lists none, what ``otherwise`` says.

    Raises:
      UserError: a list that is not of ``num_hidden_layers`` layers, or has another kind of layer in it.
    """
    layers, listed = config["num_hidden_layers"], config.get("layer_types")
    if listed is None:
        return tuple(layer for layer in range(layers) if otherwise(layer))
    if len(listed) != layers or not set(listed) <= {LOCAL, GLOBAL}:
        raise UserError(
            f"config.json has {len(listed)} layer_types of {sorted(set(listed))}, expected {layers} of {LOCAL!r} and "
            f"{GLOBAL!r}"
        )
    return tuple(layer for layer, kind in enumerate(listed) if kind == LOCAL)


def read_period(config: Mapping[str, Any], default: int) -> int:
    """The period in a ``config.json``; ``default`` where it lists no layers, or those of that period.

    Raises:
      UserError: a list that is not of ``num_hidden_layers`` layers, or has no period.
    """
    layers = config["num_hidden_layers"]
    local = local_layers(config, lambda layer: not is_global(layer, default))
    first = next((layer + 1 for layer in range(layers) if layer not in local), 0)
    for period in (default, first):
        if local == tuple(layer for layer in range(layers) if not is_global(layer, period)):
            return period
    raise UserError(
        f"config.json has layer_types with {GLOBAL!r} at layer {first - 1} (from 0), but not at every multiple of "
        f"{first} layers and nowhere else, which is all that lmx computes"
    )
