"""The original Transformer (Vaswani et al. 2017) on pairs: docstrings from code, or a translation.

lmx train configs/transformer.py
lmx train configs/transformer.py:translation --data.sources.0.files "en/*.txt" --data.sources.0.target-files "de/*.txt"
lmx train configs/transformer.py:help_pages
lmx bench train configs/transformer.py:transformer_base --batch 8 --length 128 --objective.target-length 64

Expect of the first with --train.steps 300, in two minutes on two cores, 5.96 nats a held-out token and 16.1% of them
right (the commonest alone: 5.7%); a whole run takes 2,000 steps. Of the second, what the files give; the last only
measures speed.

The third translates the help of LibreOffice from English to German, as Debian's packages libreoffice-help-en-us and
libreoffice-help-de install it. Expect BLEU 24.8 after 28 minutes. What it prints beside the loss: the BLEU of what the
model writes for held-out pages, and that of copying the source (eval_bleu, eval_copy_bleu).
"""

from dataclasses import replace

from lmx.data.config import AlignedFiles, AlignedPages, DataConfig, Docstrings, TrainedBpe
from lmx.experiment import EvalConfig, Experiment, TrainConfig
from lmx.models.families.transformer import PRESETS, Transformer
from lmx.objectives.seq_to_seq import SeqToSeq
from lmx.optim.catalogue import Muon
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule


def transformer() -> Experiment:
    """The first paragraph of a docstring from the code of its function; 3 layers of width 256 in each stack."""
    return Experiment(
        model=Transformer(
            vocab=8192,
            context=256,
            layers=3,
            width=256,
            heads=4,
            head_dim=64,
            hidden=1024,
            dropout=0.1,
        ),
        data=DataConfig(sources=(Docstrings(),), tokenizer=TrainedBpe(vocab_size=8192)),
        objective=SeqToSeq(target_length=64, label_smoothing=0.1),
        optimizer=AdamW(b2=0.98),
        schedule=Schedule(peak=1e-3, warmup=200, final=0.05),
        train=TrainConfig(steps=2000, batch=8, length=256, remat="none"),
        eval=EvalConfig(every=500, rows=128),
    )


def translation() -> Experiment:
    """From files that are aligned by line."""
    base = transformer()
    return replace(
        base,
        data=replace(base.data, sources=(AlignedFiles(),)),
        objective=SeqToSeq(target_length=256, label_smoothing=0.1),
    )


def help_pages() -> Experiment:
    """The help of LibreOffice, English to German; most paragraphs are short, so a row holds several.

    BLEU 24.8 on held-out pages (copying the source: 2.9) in 28 minutes on two cores, and 11.1 after the first ten.
    """
    base = translation()
    pages = AlignedPages(
        directory="/usr/share/libreoffice/help/en-US/text", target_directory="/usr/share/libreoffice/help/de/text"
    )
    return replace(
        base,
        model=Transformer(vocab=6144, context=128, layers=3, width=256, heads=4, head_dim=64, hidden=1024),
        data=DataConfig(sources=(pages,), tokenizer=TrainedBpe(vocab_size=6144), held_out=0.03),
        objective=SeqToSeq(target_length=128, label_smoothing=0.1),
        optimizer=Muon(),
        schedule=Schedule(peak=2e-3, warmup=100, final=0.05),
        train=replace(base.train, steps=1100, batch=16, length=128),
        eval=EvalConfig(every=275, rows=64, written=200),
    )


def transformer_base() -> Experiment:
    """The paper's base model."""
    base = transformer()
    return replace(
        base,
        model=PRESETS["transformer_base"],
        data=replace(base.data, tokenizer=TrainedBpe(vocab_size=37_000)),
        train=replace(base.train, steps=100_000, batch=96, remat="dots"),
    )
