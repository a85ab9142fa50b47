"""What a process needs to load a checkpoint: the model, one stacked parameter, one tensor, and no copy of the files."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from lmx.checkpoint.huggingface.files import write_file
from lmx.checkpoint.huggingface.plan import make_plan
from lmx.checkpoint.huggingface.tensors import INDEX
from lmx.models.families.llama import Llama

MIB = 2**20
LOAD = """
import sys
import jax, jax.numpy as jnp
from pathlib import Path
from lmx.checkpoint.huggingface import import_params, open_directory

def highest():  # of this process alone: getrusage counts what its parent had before the exec
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

jax.block_until_ready(jnp.ones(8) + 1)
bare = highest()
checkpoint = open_directory(sys.argv[1])
params = import_params(checkpoint.config, checkpoint.tensors)
sizes = sorted(a.nbytes for a in jax.tree.leaves(params))
print(bare, sum(sizes), sizes[-1], highest())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_loading_peaks_under_the_model_and_two_of_its_tensors(tmp_path):
    config = Llama(vocab=1000, context=64, layers=16, width=512, heads=8, kv_heads=2, head_dim=64, hidden=2048)
    holders = make_plan(config).holders
    weights, (first, second) = {}, (list(holders)[::2], list(holders)[1::2])
    for file, names in (("first.safetensors", first), ("second.safetensors", second)):
        infos = {n: jax.ShapeDtypeStruct(holders[n].shape, np.dtype(ml_dtypes.bfloat16)) for n in names}
        write_file(tmp_path / file, infos, lambda n, infos=infos: np.full(infos[n].shape, 0.5, ml_dtypes.bfloat16))
        weights |= dict.fromkeys(names, file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
    (tmp_path / "config.json").write_text(json.dumps(config.to_huggingface()))
    out = subprocess.run([sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, check=True).stdout
    bare, model, largest, peak = map(int, out.split())
    assert model > 100 * MIB
    assert peak < bare + model + 2 * largest, [n / MIB for n in (bare, model, largest, peak)]
