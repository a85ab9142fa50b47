"""The model families: one short file each, a configuration with presets over the shared parts.

Importing this package imports every file in it, so that a run's configuration or a ``config.json`` can name any of
them: a new family is a new file, and nothing else.
"""

import importlib
import pkgutil

from lmx.models.config import ModelConfig

_MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]


def known() -> dict[str, type[ModelConfig]]:
    """Every family's configuration, by the family's name and the other model types that it reads."""
    found: dict[str, type[ModelConfig]] = {}
    rest = ModelConfig.__subclasses__()
    while rest:
        cls = rest.pop()
        rest += cls.__subclasses__()
        if cls.__module__.startswith(f"{__name__}."):
            found |= dict.fromkeys((cls.family, *cls.also), cls)
    return found


def presets() -> dict[str, ModelConfig]:
    """The published sizes of every family, by name: what the families' files call ``PRESETS``."""
    return {name: config for module in _MODULES for name, config in getattr(module, "PRESETS", {}).items()}
