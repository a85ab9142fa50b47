"""``lmx.load(path)``: a model from its directory, onto a device or a mesh."""

import os
from pathlib import Path
from typing import Any

from lmx.decode.classified import MULTI_LABEL
from lmx.decode.loaded import Model
from lmx.decode.sources import open_source
from lmx.sharding.layouts import find_layout
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: Any = None,
    mesh: MeshConfig | str | None = None,
    rules: Rules | None = None,
    reading: Rules | str | None = None,
) -> Model:
    """The model in a directory. In a job of several processes, all of them call this, and what they call after it.

    Args:
      path: a run directory (its averaged parameters if the run averaged them, else its parameters), a Hugging Face
        directory (``config.json``, safetensors and, for text, a tokenizer), or what ``lmx convert --to lmx`` made.
      step: of a run, the checkpoint's step; the newest good one by default.
      dtype: of the parameters and of the computation. By default they stay as stored, and a run's model computes in the
        run's dtype, another in that of its parameters.
      mesh: the devices to spread the model over, or the name of a layout (:mod:`lmx.sharding.layouts`) that has rules
        too; one device of each process by default.
      rules: how the model's axes lie on the mesh; by default the layout's, else the run's, else lmx's own.
      reading: the rules of activations while prompts are read, or the name of a layout that has them; by default as
        tokens are written. Parameters and cache lie as ``rules`` say.

    Raises:
      UserError: no model there, no such checkpoint, or files that are missing, not whole, or do not fit each other; a
        mesh that does not fit the devices or the model, or no such layout.
      LmxError: every checkpoint is damaged.

    Warns:
      UserWarning: a tensor that holds NaN or infinite values, by name; settings that are passed over.
    """
    source = open_source(Path(path))
    if isinstance(mesh, str):
        layout = find_layout(mesh)
        mesh, rules = layout.mesh, rules or layout.rules
    own = source.experiment.rules if source.experiment else Rules()
    sharding = None if mesh is None else Sharding(build_mesh(mesh), rules or own)
    params, at = source.read(dtype, sharding, step)
    return Model(
        source.config,
        params,
        source.tokenizer,
        dtype or source.compute,
        at,
        source.experiment,
        source.defaults,
        source.template,
        sharding,
        find_layout(reading).rules if isinstance(reading, str) else reading,
        source.classes,
        source.entries.get("problem_type") == MULTI_LABEL,
    )
