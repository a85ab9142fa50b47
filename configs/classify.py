"""Which top-level module of the Python standard library does a snippet come from? (20 classes.)

lmx train configs/classify.py
lmx train configs/bert.py:modern --run-dir runs/mlm
lmx train configs/classify.py:finetuning --run-dir runs/finetuned
lmx train configs/classify.py:from_scratch --run-dir runs/scratch

The first is complete by itself.
"""

from dataclasses import replace

from bert import modern

from lmx.data.config import DataConfig, StdlibModules, TokenizerFile, TrainedBpe
from lmx.experiment import EvalConfig, Experiment, TrainConfig
from lmx.objectives.classification import Classification
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule


def classify() -> Experiment:
    """About 2.3M parameters, from scratch, with a tokenizer of its own and all labels."""
    base = modern()
    return Experiment(
        model=replace(base.model, task="sequence_classification", classes=20, pooling="mean"),
        data=DataConfig(
            sources=(StdlibModules(snippet_bytes=160),), tokenizer=TrainedBpe(vocab_size=4096), held_out=0.1
        ),
        objective=Classification(),
        optimizer=AdamW(weight_decay=0.01),
        schedule=Schedule(peak=1e-3, warmup=25, final=0.0),
        train=TrainConfig(steps=400, batch=32, length=64, remat="none"),
        eval=EvalConfig(every=100, rows=1024),
    )


def finetuning() -> Experiment:
    """What was pretrained, with its tokenizer; the head for classes starts fresh. 20 labels a class, 20 epochs."""
    return replace(from_scratch(), init_from="runs/mlm")


def from_scratch() -> Experiment:
    """The same without its weights."""
    base = classify()
    data = replace(base.data, tokenizer=TokenizerFile(path="runs/mlm/tokenizer"), held_out=0.96)
    return replace(base, data=data, train=replace(base.train, steps=250))
