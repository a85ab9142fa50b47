"""What every command that computes sets up first."""

import os
from pathlib import Path


def start_jax() -> None:
    """Turns on JAX's compilation cache, in $LMX_CACHE or ~/.cache/lmx unless JAX's own setting names a place."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("LMX_CACHE") or Path.home() / ".cache" / "lmx"
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
