"""SQuAD (Rajpurkar et al. 2016, 2018) from its own JSON: exact match and F1.

lmx eval MODEL --tasks configs/tasks/squad.py --files dev-v1.1.json
"""

from lmx.eval.tasks import ExtractiveQa


def squad() -> ExtractiveQa:
    """By the head that finds stretches if the model has one, else in words."""
    return ExtractiveQa()
