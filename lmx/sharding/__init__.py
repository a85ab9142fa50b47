"""The device mesh, the rules that lay logical axes on it, and multi-process start-up."""

import os
from importlib.metadata import version

# XLA of jaxlib 0.12 aborts the process on a manual region inside another one (a ring in a pipeline) whose axes come
# first in the mesh: its new form of shardings wants them sorted. The old form does not. Flags are read when JAX starts.
OLD_SHARDINGS = "--xla_enable_hlo_sharding_v3=false"

if version("jaxlib").startswith("0.12.") and "xla_enable_hlo_sharding_v3" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {OLD_SHARDINGS}".strip()
