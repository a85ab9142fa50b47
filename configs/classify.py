"""Which top-level module of the Python standard library does a snippet come from? (20 classes.)

lmx train configs/classify.py
lmx train configs/classify.py:pretraining --run-dir runs/mlm
lmx train configs/classify.py:finetuning --run-dir runs/finetuned
lmx train configs/classify.py:from_scratch --run-dir runs/scratch

The first is complete by itself. The others compare: what masked-token pretraining on the library's text gives to the
same model, tokenizer and number of steps. What is printed: the accuracy on held-out snippets, what always guessing the
commonest module reaches (eval_accuracy, eval_baseline_accuracy), and macro F1 (eval_f1). Only their labels are
held out: pretraining has read the text of most snippets.
"""

from dataclasses import replace

from lmx.data.config import DataConfig, PythonStdlib, StdlibModules, TokenizerFile, TrainedBpe
from lmx.experiment import EvalConfig, Experiment, TrainConfig
from lmx.models.families.bert import Bert
from lmx.objectives.classification import Classification
from lmx.objectives.masked_lm import MaskedLm
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule


def classify() -> Experiment:
    """About 2.5M parameters, from scratch, with a tokenizer of its own."""
    return Experiment(
        model=Bert(
            vocab=4096,
            context=128,
            layers=2,
            width=192,
            heads=4,
            hidden=768,
            task="sequence_classification",
            classes=20,
        ),
        data=DataConfig(sources=(StdlibModules(),), tokenizer=TrainedBpe(vocab_size=4096), held_out=0.1),
        objective=Classification(),
        optimizer=AdamW(weight_decay=0.01),
        schedule=Schedule(peak=5e-4, warmup=40, final=0.05),
        train=TrainConfig(steps=400, batch=16, length=128, remat="none"),
        eval=EvalConfig(every=200),
    )


def pretraining() -> Experiment:
    """The same encoder learns masked tokens of the whole library first."""
    base = classify()
    return replace(
        base,
        model=replace(base.model, task="token_prediction"),
        data=DataConfig(sources=(PythonStdlib(),), tokenizer=TrainedBpe(vocab_size=4096)),
        objective=MaskedLm(),
        schedule=Schedule(peak=1e-3, warmup=100, final=0.05),
        train=replace(base.train, steps=2000),
        eval=EvalConfig(every=500, rows=256),
    )


def finetuning() -> Experiment:
    """What was pretrained, with its tokenizer; the head for classes starts fresh."""
    base = from_scratch()
    return replace(base, init_from="runs/mlm")


def from_scratch() -> Experiment:
    """The same without its weights."""
    base = classify()
    return replace(base, data=replace(base.data, tokenizer=TokenizerFile(path="runs/mlm/tokenizer")))
