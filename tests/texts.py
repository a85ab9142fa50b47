"""Texts of random tokens, and what a layout needs beside them."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from lmx.data.layout import Piece
from lmx.objectives.objective import Objective
from lmx.objectives.vocabulary import Vocabulary

SEEDS = st.integers(0, 2**32)
FEW = settings(max_examples=60, deadline=None)
VOCAB = 250
TEXT = st.lists(st.integers(120, VOCAB - 1), min_size=1, max_size=60).map(lambda tokens: np.array(tokens, np.int32))


def vocabulary(objective: Objective) -> Vocabulary:
    return Vocabulary.invented(VOCAB, objective.special_tokens)


def nobody(rng: np.random.Generator) -> np.ndarray | None:
    return None


def piece(text: np.ndarray) -> Piece:
    """A whole document: end, text, end."""
    return Piece(np.concatenate([[0], text, [0]]).astype(np.int32))
