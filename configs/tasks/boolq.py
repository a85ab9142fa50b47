"""BoolQ (Clark et al. 2019): yes or no questions about a passage, from its jsonl files.

    lmx eval MODEL --tasks configs/tasks/boolq.py --files BoolQ/dev.jsonl

Guessing the more frequent answer reaches about 0.62.
"""

from lmx.eval.tasks import Classification


def boolq() -> Classification:
    """Which of " yes" and " no" is likelier after the question."""
    return Classification(
        prompt="{passage}\nQuestion: {question}?\nAnswer:",
        classes=("False", "True"),
        words=("no", "yes"),
        label="answer",
    )
