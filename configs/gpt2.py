"""GPT-2 (Radford et al. 2019) in its four sizes, trained on the Python standard library unless told otherwise.

lmx train configs/gpt2.py:gpt2_124m --train.batch 8 --train.accumulate 2
lmx train configs/gpt2.py:gpt2_355m --mesh.data 1 --mesh.fsdp 8
lmx train configs/gpt2.py:gpt2_774m --mesh.data 1 --mesh.fsdp 8
lmx train configs/gpt2.py:gpt2_1558m --mesh.data 1 --mesh.fsdp 8
lmx bench train configs/gpt2.py:gpt2_124m --batch 4 --length 512 --steps 10

None was trained to its end. Expect of the last about 370 tokens a second in float32 on two fast cores (README,
Measured), and of lmx model 124,439,808, 354,823,168, 774,030,080 and 1,557,611,200 parameters.
"""

from dataclasses import replace

from lmx.data.config import DataConfig, TrainedBpe
from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.gpt2 import Gpt2
from lmx.optim.schedule import Schedule


def gpt2_124m() -> Experiment:
    """12 layers of width 768."""
    return Experiment(
        model=Gpt2(layers=12, width=768, heads=12),
        data=DataConfig(tokenizer=TrainedBpe(vocab_size=50257)),
        schedule=Schedule(peak=6e-4, warmup=700),
        train=TrainConfig(steps=20_000, batch=32, length=1024),
    )


def gpt2_355m() -> Experiment:
    """24 layers of width 1024."""
    return _sized(layers=24, width=1024, heads=16, peak=3e-4)


def gpt2_774m() -> Experiment:
    """36 layers of width 1280."""
    return _sized(layers=36, width=1280, heads=20, peak=2.5e-4)


def gpt2_1558m() -> Experiment:
    """48 layers of width 1600, bfloat16 matrix products."""
    base = _sized(layers=48, width=1600, heads=25, peak=2e-4)
    return replace(base, train=replace(base.train, compute="bfloat16"))


def _sized(layers: int, width: int, heads: int, peak: float) -> Experiment:
    base = gpt2_124m()
    return replace(
        base,
        model=Gpt2(layers=layers, width=width, heads=heads),
        schedule=replace(base.schedule, peak=peak),
    )
