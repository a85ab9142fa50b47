"""Mixtral shapes (Jiang et al. 2024): 47B parameters of which 13B see a token, the experts spread over devices.

lmx train configs/mixtral.py:mixtral_8x7b --mesh.fsdp 16 --mesh.expert 8
lmx plan configs/mixtral.py:mixtral_8x7b --topology v5p:4x4x8 --mesh.fsdp 16 --mesh.expert 8

It was neither trained nor compiled whole. Expect of lmx model 46,702,792,704 parameters, of which 12,879,925,248 see a
token.
"""

from lmx.data.config import DataConfig, TrainedBpe
from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.mixtral import Mixtral
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule
from lmx.sharding.mesh import MeshConfig


def mixtral_8x7b() -> Experiment:
    """32 layers of width 4096, 8 experts of which 2 are chosen; block inputs alone are kept for the backward pass."""
    return Experiment(
        model=Mixtral(balance_loss=0.02),
        data=DataConfig(tokenizer=TrainedBpe(vocab_size=32_000)),
        optimizer=AdamW(),
        schedule=Schedule(peak=3e-4, warmup=2000),
        train=TrainConfig(steps=100_000, batch=256, length=4096, compute="bfloat16", remat="full"),
        mesh=MeshConfig(data=1, fsdp=-1, expert=8),
    )
