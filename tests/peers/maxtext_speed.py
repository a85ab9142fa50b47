"""How fast MaxText trains GPT-2 124M's shape on a CPU: float32, 4 rows of 512, synthetic data, no dropout.

Run it in an environment of Python 3.12 with ``maxtext`` (0.2.5 was tried) and what its trainer imports:
``python tests/peers/maxtext_speed.py minimal``. The argument is its ``remat_policy``; ``none`` unrolls the layers,
as a scan without one keeps nothing. A step's time is that between two lines of its log, each written when a step's loss
exists.
"""

import importlib.util
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

SHAPE = {
    "decoder_block": "gpt3",  # the one with GPT-2's norms, biases, GELU and learned positions
    "base_num_decoder_layers": 12,
    "base_emb_dim": 768,
    "base_num_query_heads": 12,
    "base_num_kv_heads": 12,
    "head_dim": 64,
    "base_mlp_dim": 3072,
    "mlp_activations": "['gelu']",
    "fused_qkv": True,
    "vocab_size": 50304,
    "trainable_position_size": 1024,
    "logits_via_embedding": True,
    "normalize_embedding_logits": False,
    "use_iota_embed": False,
    "param_scan_axis": 0,
}
RUN = {
    "per_device_batch_size": 4,
    "max_target_length": 512,
    "dtype": "float32",
    "weight_dtype": "float32",
    "grad_dtype": "float32",
    "enable_dropout": False,
    "dropout_rate": 0.0,
    "opt_type": "adamw",
    "dataset_type": "synthetic",
    "packing": False,
    "attention": "dot_product",
    "steps": 6,
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "enable_checkpointing": False,
    "enable_tensorboard": False,
    "enable_goodput_recording": False,
    "monitor_goodput": False,
    "jax_cache_dir": "",
}


def measure(remat: str) -> float:
    """Tokens a second, by the median of the steps after the first."""
    package = importlib.util.find_spec("maxtext")
    assert package is not None
    assert package.submodule_search_locations
    base = Path(package.submodule_search_locations[0]) / "configs" / "base.yml"
    settings = {**SHAPE, **RUN, "remat_policy": remat, "scan_layers": remat != "none", "run_name": "bench"}
    with tempfile.TemporaryDirectory() as directory:
        settings["base_output_directory"] = directory
        command = [sys.executable, "-m", "maxtext.trainers.pre_train.train", str(base)]
        command += [f"{name}={value}" for name, value in settings.items()]
        environment = {**os.environ, "DECOUPLE_GCLOUD": "TRUE", "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        log = subprocess.run(
            command, env=environment, cwd=directory, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    if log.returncode:
        sys.exit(log.stdout[-3000:])
    times = [re.search(r"\d\d:\d\d:\d\d[.,]\d+", line) for line in log.stdout.splitlines() if "completed step" in line]
    seconds = [datetime.strptime(t.group().replace(",", "."), "%H:%M:%S.%f").timestamp() for t in times if t]
    return 4 * 512 / statistics.median(b - a for a, b in itertools.pairwise(seconds))


if __name__ == "__main__":
    for policy in sys.argv[1:] or ("minimal",):
        print(f"maxtext, remat {policy}: {measure(policy):.1f} tokens/s", flush=True)
