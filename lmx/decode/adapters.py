"""What a run trained beside a model, written alone in PEFT's form."""

import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from lmx.adapters.adapter import Lora
from lmx.adapters.peft import write_peft
from lmx.checkpoint.huggingface import new_directory
from lmx.decode.sources import Source, read_trained
from lmx.errors import UserError
from lmx.experiment import RunDir


def export_adapter(
    source: Source, target: Path, dtype: str | None, step: int | None, told: Callable[[str], None]
) -> tuple[dict[str, int], dict[str, float]]:
    """Writes a run's adapter to a new directory for PEFT; how many numbers of each dtype it has, and what was compared.

    Raises:
      UserError: no run that trained an adapter, or one that has no such form.
      LmxError: what was read back is not what was written; nothing is left at ``target``.
    """
    run = source.experiment
    if run is None or not isinstance(run.adapter, Lora):
        raise UserError(f"{source.path} trained no adapter, which is what --to peft writes; use --to hf for the model")
    if not (Path(run.init_from) / "config.json").is_file():
        warnings.warn(
            f"the adapter's base {run.init_from} is no Hugging Face directory: convert it with --to hf, and give PEFT "
            "that",
            stacklevel=2,
        )
    told("reading the adapter")
    own, _ = read_trained(RunDir(source.path), run, None, step)
    own = jax.tree.map(lambda a: a.astype(dtype or jnp.float32), own)
    with new_directory(target) as folder:
        told("writing it, and reading it back")
        compared = write_peft(source.config, run.adapter, own, run.init_from, folder)
    return {str(jnp.dtype(dtype or jnp.float32)): sum(leaf.size for leaf in jax.tree.leaves(own))}, compared
