"""What a process needs to load a checkpoint: the model, one stacked parameter, one tensor, and no copy of the files."""

from pathlib import Path

import pytest

from lmx.checkpoint.benchmark import bench_load, random_directory
from lmx.errors import LmxError
from lmx.models.families.llama import Llama

MIB = 2**20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_loading_peaks_under_the_model_and_two_of_its_tensors(tmp_path):
    config = Llama(vocab=1000, context=64, layers=16, width=512, heads=8, kv_heads=2, head_dim=64, hidden=2048)
    random_directory(config, tmp_path, shards=3)
    assert len(list(tmp_path.glob("*.safetensors"))) in (3, 4)
    found = bench_load(tmp_path)
    assert found["parameter_bytes"] > 100 * MIB
    assert found["peak_memory_bytes"] < found["bound_bytes"], {k: n / MIB for k, n in found.items()}


def test_a_failed_load_says_why(tmp_path):
    with pytest.raises(LmxError, match="has no config"):
        bench_load(tmp_path)
