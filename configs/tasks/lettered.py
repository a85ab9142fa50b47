"""Multiple choice whose options are lines of text, "A. bank": OpenBookQA, CommonsenseQA as some collections have them.

    lmx eval MODEL --tasks configs/tasks/lettered.py --files OpenBookQA/test.jsonl

Guessing reaches 1 / the number of options.
"""

from lmx.eval.tables import Example
from lmx.eval.tasks import MultipleChoice


def options(row: Example) -> list[str]:
    """The options without their letters."""
    return [line.split(". ", 1)[1].strip() for line in row["options"].strip().splitlines()]


def lettered() -> MultipleChoice:
    """Which option's text is likeliest after the question."""
    return MultipleChoice(
        prompt="Question: {question}\nAnswer:",
        choices=options,
        answer=lambda row: row["answer"].split(". ", 1)[1].strip(),
    )
