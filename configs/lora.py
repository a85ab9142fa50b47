"""Adapters beside a model: LoRA, DoRA and QLoRA, on the standard library or on your own text.

lmx train configs/quickstart.py
lmx train configs/lora.py
lmx train configs/lora.py:dora --run-dir runs/dora
lmx train configs/lora.py:qlora --run-dir runs/qlora
lmx train configs/lora.py:own_text --data.sources.0.files "my/texts/*.txt" --run-dir runs/mine
lmx train configs/lora.py:own_text_whole --data.sources.0.files "my/texts/*.txt" --run-dir runs/whole
lmx convert runs/quickstart exported --to hf && lmx convert runs/lora adapter --to peft

An adapter is all that is trained and kept; runs/quickstart has to stay where it is. Expect 4.94 nats of the second to
fourth, where the quickstart itself has 4.95: more steps on its own text teach little. Of the fifth and sixth expect
2.51 and 2.45 bits per byte on the King James Bible (README).

How near an adapter comes to training all parameters (both best of two learning rates):

lmx train configs/lora.py:base --run-dir runs/base
lmx train configs/lora.py:docstrings --run-dir runs/adapted
lmx train configs/lora.py:docstrings_whole --run-dir runs/tuned
lmx report runs/adapted runs/tuned

Expect 3.94 nats a held-out token of all parameters, and 4.00 of the adapter (means of three seeds): 1.7% more with 2%
of the parameters. The base has read the library, docstrings of held-out functions among it; what is new to it is to be
asked.
"""

from dataclasses import replace

from quickstart import quickstart

from lmx.adapters.adapter import Dora, Lora, Whole
from lmx.data.config import DataConfig, Docstrings, LocalFiles, TokenizerFile
from lmx.experiment import EvalConfig, Experiment
from lmx.objectives.seq_to_seq import SeqToSeq
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule


def lora() -> Experiment:
    """LoRA of rank 8 on every hidden matrix."""
    base = quickstart()
    return replace(
        base,
        adapter=Lora(rank=8, alpha=16.0),
        init_from="runs/quickstart",
        optimizer=AdamW(weight_decay=0.0),
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
    """On text files: give them with --data.sources.0.files. The tokenizer is the base's; its table has an adapter too,
    because another text has other words."""
    base = lora()
    data = replace(base.data, sources=(LocalFiles(),), tokenizer=TokenizerFile(path="runs/quickstart/tokenizer"))
    return replace(
        base,
        adapter=Lora(rank=8, alpha=16.0, table_rank=8),
        data=data,
        schedule=Schedule(peak=1e-2, warmup=10),
        sample=replace(base.sample, prompts=("The ",)),
    )


def own_text_whole() -> Experiment:
    """All parameters on the same text, in as many steps: what an adapter is compared with."""
    return replace(own_text(), adapter=Whole(), schedule=Schedule(peak=1e-3, warmup=10))


def base() -> Experiment:
    """The quickstart's model, trained for longer: what there is to know of its text it knows better."""
    quick = quickstart()
    return replace(
        quick,
        schedule=Schedule(peak=4e-3, warmup=100, final=0.02),
        train=replace(quick.train, steps=1600, batch=8),
        eval=EvalConfig(every=400, rows=64),
        sample=replace(quick.sample, every=0),
    )


def docstrings() -> Experiment:
    """What a function does, from its code: 75,520 of the 3.8 million parameters (1.99%) learn it."""
    return replace(
        docstrings_whole(), adapter=Lora(rank=3, alpha=6.0, table_rank=5), schedule=Schedule(peak=1e-2, warmup=10)
    )


def docstrings_whole() -> Experiment:
    """All parameters learn it."""
    known = base()
    return replace(
        known,
        init_from="runs/base",
        data=DataConfig(sources=(Docstrings(),), tokenizer=TokenizerFile(path="runs/base/tokenizer"), held_out=0.05),
        objective=SeqToSeq(target_length=64),
        optimizer=AdamW(weight_decay=0.0),
        schedule=Schedule(peak=1e-3, warmup=10),
        train=replace(known.train, steps=150),
        eval=EvalConfig(every=50, rows=96),
    )
