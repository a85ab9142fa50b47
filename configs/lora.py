"""Adapters beside the quickstart model: LoRA, DoRA and QLoRA, on the standard library or on your own text.

lmx train configs/quickstart.py
lmx train configs/lora.py
lmx train configs/lora.py:own_text --data.sources.0.files "my/texts/*.txt" --run-dir runs/mine
lmx train configs/lora.py:own_text_whole --data.sources.0.files "my/texts/*.txt" --run-dir runs/whole
lmx convert runs/quickstart exported --to hf && lmx convert runs/lora adapter --to peft

An adapter is all that is trained and kept; runs/quickstart has to stay where it is. The number of steps and the
learning rate are first guesses: lmx lr configs/lora.py suggests one.
"""

from dataclasses import replace

from quickstart import quickstart

from lmx.adapters.adapter import Dora, Lora, Whole
from lmx.data.config import LocalFiles, TokenizerFile
from lmx.experiment import Experiment
from lmx.optim.schedule import Schedule


def lora() -> Experiment:
    """LoRA of rank 8 on every hidden matrix."""
    base = quickstart()
    return replace(
        base,
        adapter=Lora(rank=8, alpha=16.0),
        init_from="runs/quickstart",
        optimizer=replace(base.optimizer, weight_decay=0.0),
        schedule=Schedule(peak=1e-3, warmup=10),
        train=replace(base.train, steps=100),
        eval=replace(base.eval, every=50, xz=False),
        sample=replace(base.sample, every=50),
    )


def dora() -> Experiment:
    """The lengths of the columns trained beside."""
    return replace(lora(), adapter=Dora(rank=8, alpha=16.0))


def qlora() -> Experiment:
    """The base in 4 bits."""
    return replace(lora(), adapter=Lora(rank=8, alpha=16.0, base="nf4"))


def own_text() -> Experiment:
    """On text files: give them with --data.sources.0.files. The tokenizer is the base's."""
    base = lora()
    data = replace(base.data, sources=(LocalFiles(),), tokenizer=TokenizerFile(path="runs/quickstart/tokenizer"))
    return replace(base, data=data, sample=replace(base.sample, prompts=("The ",)))


def own_text_whole() -> Experiment:
    """All parameters on the same text, in as many steps: what an adapter is compared with."""
    return replace(own_text(), adapter=Whole())
