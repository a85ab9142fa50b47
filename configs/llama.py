"""Llama 3 shapes (Dubey et al. 2024): 1B, 8B and 70B parameters, bfloat16 matrix products, parameters sharded.

lmx train configs/llama.py:llama_1b --mesh.data 1 --mesh.fsdp 8
lmx train configs/llama.py:llama_8b --mesh.data 1 --mesh.fsdp 64
lmx train configs/llama.py:llama_70b --mesh.data 1 --mesh.fsdp 512
lmx plan configs/llama.py:llama_8b --topology v5p:4x4x4 --mesh.data 1 --mesh.fsdp 64

None was trained; for a Llama that trains in minutes see quickstart.py. The last command compiles a step for chips that
are not there (README, Sharding, has what it told of four layers). Expect of lmx model 1,235,814,400, 8,030,261,248 and
70,553,706,496 parameters.
"""

from dataclasses import replace

from lmx.data.config import DataConfig, TrainedBpe
from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.llama import Llama
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule
from lmx.sharding.mesh import MeshConfig


def llama_1b() -> Experiment:
    """16 layers of width 2048, tied output table (as Llama 3.2 1B)."""
    return Experiment(
        model=Llama(layers=16, width=2048, heads=32, kv_heads=8, head_dim=64, hidden=8192, tied=True),
        data=DataConfig(tokenizer=TrainedBpe(vocab_size=128_256)),
        optimizer=AdamW(),
        schedule=Schedule(peak=4e-4, warmup=2000),
        train=TrainConfig(steps=100_000, batch=256, length=4096, compute="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def llama_8b() -> Experiment:
    """32 layers of width 4096."""
    base = llama_1b()
    return replace(base, model=Llama(), schedule=replace(base.schedule, peak=3e-4))


def llama_70b() -> Experiment:
    """80 layers of width 8192; block inputs alone are kept for the backward pass."""
    base = llama_8b()
    return replace(
        base,
        model=Llama(layers=80, width=8192, heads=64, kv_heads=8, hidden=28_672),
        schedule=replace(base.schedule, peak=1.5e-4),
        train=replace(base.train, remat="full"),
    )
