"""The two splits of a corpus: what is trained on, and what is held out."""

from typing import Literal

import numpy as np

from lmx.data.documents import Documents

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


def held_out_mask(documents: Documents, share: float) -> np.ndarray:
    """Which documents are held out, bool ``[documents]``: those whose text hashes low; copies go together.

    A small corpus may have none that low; then it is the one that hashes lowest, unless it is the only one. Where the
    source itself says what is held out, it is that. Of documents in groups, whole groups are held out, without the
    texts that also stand in the others.
    """
    if documents.given is not None:
        return documents.given & (np.asarray(documents.sizes) > 0)
    hashes, real = np.asarray(documents.hashes), np.asarray(documents.sizes) > 0
    if share == 1:
        return real
    if documents.groups is not None:
        mask = _lowest(documents.groups, real, share)
        return mask & ~np.isin(hashes, hashes[~mask])
    return _lowest(hashes, real, share)


def _lowest(hashes: np.ndarray, real: np.ndarray, share: float) -> np.ndarray:
    mask = (hashes < np.uint64(int(share * 2**64))) & real
    different = np.unique(hashes[real])
    if share and not mask.any() and len(different) > 1:
        mask = (hashes == different[0]) & real
    return mask
