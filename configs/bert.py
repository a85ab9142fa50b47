"""BERT pretraining (Devlin et al. 2018) on the Python standard library: masked tokens, and next sentences.

lmx train configs/bert.py:modern
lmx train configs/bert.py
lmx train configs/bert.py:whole_words
lmx train configs/bert.py:sentence_order
lmx bench train configs/bert.py:bert_base --batch 8 --length 128

Expect of the first 45% of the masked tokens and 72% of the pairs in 16 minutes on two cores. The others are BERT's own
shape, which stays near the commonest tokens for long: of the second 8% and 53% with --train.steps 300, in a minute and
a half, of the third 8.6%, and of the fourth 8.4% and 53%. Expect of the last 490 tokens a second (README, Measured).

What it prints beside the loss: the accuracy on masked tokens of held-out modules and what always guessing the commonest
token reaches (eval_accuracy, eval_baseline_accuracy), and that on pairs (eval_pair_accuracy; chance is 0.5).
"""

from dataclasses import replace

from lmx.data.config import DataConfig, TrainedBpe
from lmx.experiment import EvalConfig, Experiment, TrainConfig
from lmx.models.families.bert import PRESETS, Bert
from lmx.models.families.modernbert import ModernBert
from lmx.objectives.masked_lm import MaskedLm, Nsp
from lmx.objectives.masking import WholeWords
from lmx.objectives.sentences import SentenceOrder
from lmx.optim.catalogue import Muon
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule


def bert() -> Experiment:
    """About 6M parameters: 4 layers of width 256."""
    return Experiment(
        model=Bert(vocab=8192, context=128, layers=4, width=256, heads=4, hidden=1024, task="pretraining"),
        data=DataConfig(tokenizer=TrainedBpe(vocab_size=8192)),
        objective=Nsp(),
        optimizer=AdamW(weight_decay=0.01),
        schedule=Schedule(peak=1e-3, warmup=100, final=0.05),
        train=TrainConfig(steps=2400, batch=16, length=128, remat="none"),
        eval=EvalConfig(every=600, rows=256),
    )


def modern() -> Experiment:
    """The same two questions to ModernBERT's architecture with Muon, which learn far more in the same few minutes.

    2.3M parameters. Its rows are short: half as long, they teach the model to look at other tokens at all in half the
    steps, and hold twice the pairs.
    """
    base = bert()
    return replace(
        base,
        model=ModernBert(
            vocab=4096, context=128, layers=4, width=192, heads=4, hidden=384, every=1, task="pretraining"
        ),
        data=DataConfig(tokenizer=TrainedBpe(vocab_size=4096)),
        optimizer=Muon(weight_decay=0.01),
        schedule=Schedule(peak=3e-3, warmup=100, final=0.05),
        train=replace(base.train, steps=2400, batch=32, length=64),
        eval=EvalConfig(every=400, rows=1024),
    )


def whole_words() -> Experiment:
    """Whole words are masked, and nothing is asked about sentences (as RoBERTa does without)."""
    base = bert()
    return replace(base, objective=MaskedLm(masking=WholeWords()), model=replace(base.model, task="token_prediction"))


def sentence_order() -> Experiment:
    """The question is which of two neighbours comes first (ALBERT)."""
    return replace(bert(), objective=Nsp(sentences=SentenceOrder()))


def bert_base() -> Experiment:
    """BERT base's shape."""
    base = bert()
    return replace(
        base,
        model=PRESETS["bert_base"],
        data=DataConfig(tokenizer=TrainedBpe(vocab_size=30522)),
        schedule=Schedule(peak=1e-4, warmup=1000),
        train=replace(base.train, steps=100_000, batch=32, length=512, remat="dots"),
    )
