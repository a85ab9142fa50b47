"""Paired-sentence tests, from their published files.

    lmx eval MODEL --tasks configs/tasks/bias.py:crows_pairs --files crows_pairs_anonymized.csv
    lmx eval MODEL --tasks configs/tasks/bias.py:stereoset --files stereoset/dev.json

A model without a preference has a stereotype score of 50.
"""

from lmx.eval.tasks import CrowsPairs, StereoSet


def crows_pairs() -> CrowsPairs:
    """Nangia et al. 2020."""
    return CrowsPairs()


def stereoset() -> StereoSet:
    """Nadeem et al. 2021."""
    return StereoSet()
