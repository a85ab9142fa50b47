"""XSum (Narayan et al. 2018): one sentence about an article; ROUGE, BLEU and chrF.

lmx eval MODEL --tasks configs/tasks/xsum.py --files XSum/test.jsonl --limit 200
"""

from lmx.eval.tasks import Generation


def xsum() -> Generation:
    """The first line that is written after the article."""
    return Generation(
        prompt="{document}\nTL;DR:",
        references="summary",
        metrics=("rouge", "bleu", "chrf"),
    )
