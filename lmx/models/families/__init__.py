"""The model families: one short file each, a configuration with presets over the shared parts.

Importing this package imports them all, so that a run's configuration can name any of them.
"""

from lmx.models.families.gpt2 import Gpt2
from lmx.models.families.llama import Llama

__all__ = ["Gpt2", "Llama"]
