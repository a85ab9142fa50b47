"""lmx trains and serves Transformer language models with JAX, from a laptop to a pod."""

from typing import TYPE_CHECKING, Any

from lmx.errors import LmxError, UserError

if TYPE_CHECKING:
    from lmx.decode.generate import Completion
    from lmx.decode.load import load
    from lmx.decode.loaded import Model
    from lmx.experiment import Experiment

__all__ = ["Completion", "Experiment", "LmxError", "Model", "UserError", "load"]

_LAZY = {
    "Completion": "lmx.decode.generate",
    "Model": "lmx.decode.loaded",
    "load": "lmx.decode.load",
    "Experiment": "lmx.experiment",
}


def __getattr__(name: str) -> Any:
    # JAX takes most of a second to import: ``import lmx`` and ``lmx --help`` do without it.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lmx' has no attribute {name!r}")
