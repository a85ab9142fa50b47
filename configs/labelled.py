"""Fine-tuning on labelled data of your own, from the encoder of configs/bert.py:modern (or another: --init-from MODEL
--data.tokenizer.path MODEL, and that model's sizes).

lmx train configs/bert.py:modern --run-dir runs/mlm
lmx train configs/labelled.py --data.sources.0.files reviews.csv --model.classes 2
lmx train configs/labelled.py:several --data.sources.0.files topics.jsonl --model.classes 5
lmx train configs/labelled.py:ratings --data.sources.0.files stars.csv
lmx train configs/labelled.py:tags --data.sources.0.files entities.jsonl --model.classes 9
lmx train configs/labelled.py:answers --data.sources.0.files squad.json

The columns are those of LabelledTexts (text, label), RatedTexts (text, label), TaggedWords (tokens, tags) and Answers
(context, question, answers); --data.sources.0.text-column and the like name others. What to expect depends on the
data: eval_accuracy and eval_f1 stand beside what always guessing the commonest class gives (eval_baseline_accuracy).
"""

from dataclasses import replace

from classify import finetuning

from lmx.data.config import Answers, Examples, LabelledTexts, RatedTexts, TaggedWords
from lmx.experiment import EvalConfig, Experiment
from lmx.models.config_map import Task
from lmx.objectives.classification import Classification, MultiLabel, Regression
from lmx.objectives.labelled import Labelled
from lmx.objectives.span_answers import ExtractiveQa
from lmx.objectives.token_classification import TokenClassification


def labelled() -> Experiment:
    """Texts, or pairs of texts, with a class each."""
    return _tuned(LabelledTexts(), Classification(), "sequence_classification")


def several() -> Experiment:
    """Texts with any number of classes each."""
    return _tuned(LabelledTexts(), MultiLabel(), "sequence_classification")


def ratings() -> Experiment:
    """Texts with a number each."""
    base = _tuned(RatedTexts(), Regression(), "sequence_classification")
    return replace(base, model=replace(base.model, classes=1))


def tags() -> Experiment:
    """Words with a tag each."""
    return _tuned(TaggedWords(), TokenClassification(), "token_classification")


def answers() -> Experiment:
    """Questions that a stretch of a context answers, or nothing in it."""
    base = _tuned(Answers(), ExtractiveQa(), "question_answering")
    return replace(base, train=replace(base.train, length=128))


def _tuned(source: Examples, objective: Labelled, task: Task) -> Experiment:
    base = finetuning()
    return replace(
        base,
        model=replace(base.model, task=task),
        data=replace(base.data, sources=(source,)),
        objective=objective,
        train=replace(base.train, steps=200),
        eval=EvalConfig(every=50),
    )
