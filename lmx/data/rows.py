"""Rows: random-access training examples of a fixed length, in any order, at any position.

A row is a dict of int32 arrays ``[length]``: ``tokens``; ``targets``, the token after each; ``segment_ids``,
1 for the first piece in the row, 2 for the second, 0 for padding; ``positions``, counted from 0 within each
piece.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from lmx.data.packing import Plan
from lmx.data.prepare import Prepared, Split
from lmx.data.tokens import TokenStore
from lmx.errors import UserError

Row = dict[str, np.ndarray]
KEYS = ("tokens", "targets", "segment_ids", "positions")


class RowReference(NamedTuple):
    """A row of one source: their numbers."""

    source: int
    row: int


def build_row(tokens: TokenStore, plan: Plan, index: int) -> Row:
    """Row ``index`` of a plan."""
    row = padding_row(plan.length)
    at = 0
    for segment, (document, start, count) in enumerate(plan.row(index).tolist(), start=1):
        stream, place = tokens.stream(document, start, count + 1), slice(at, at + count)
        row["tokens"][place], row["targets"][place] = stream[:-1], stream[1:]
        row["segment_ids"][place] = segment
        row["positions"][place] = np.arange(count)
        at += count
    return row


def padding_row(length: int) -> Row:
    """A row that holds nothing: all zero."""
    return {key: np.zeros(length, np.int32) for key in KEYS}


def train_rows(prepared: Prepared, *, length: int, seed: int) -> grain.MapDataset:
    """The endless training mixture: row ``i`` of the run, random access, the same on every machine.

    Sources are interleaved by weight; each gives every one of its rows once per epoch of its own, in a new
    order each epoch if the configuration shuffles.

    Raises:
      UserError: a source has no training rows.
    """
    plans = _plans(prepared, "train", length)

    def read(reference: RowReference) -> Row:
        return build_row(prepared.sources[reference.source].tokens, plans[reference.source], reference.row)

    return _references(prepared, plans, seed).map(read)


def held_out_rows(prepared: Prepared, *, length: int) -> grain.MapDataset:
    """All held-out rows, source after source, in a fixed order.

    Raises:
      UserError: there are none.
    """
    plans = _plans(prepared, "held_out", length)
    ends = np.cumsum([len(plan) for plan in plans])
    if not ends[-1]:
        raise UserError(
            f"held_out is {prepared.config.held_out} and there are no held-out documents: raise held_out, or give more "
            'documents (a text file becomes several with split="paragraphs")'
        )

    def read(index: int) -> Row:
        source = int(np.searchsorted(ends, index, side="right"))
        first = int(ends[source]) - len(plans[source])
        return build_row(prepared.sources[source].tokens, plans[source], index - first)

    return grain.MapDataset.range(int(ends[-1])).map(read)


def epoch_rows(prepared: Prepared, *, length: int) -> dict[str, int]:
    """Training rows in one epoch of each source."""
    plans = _plans(prepared, "train", length)
    return {name: len(plan) for name, plan in zip(prepared.source_names, plans, strict=True)}


def documents_of(prepared: Prepared, rows: int | Sequence[int], *, length: int, seed: int) -> list[str]:
    """The names of the documents in training rows of :func:`train_rows`, each once, in order."""
    plans = _plans(prepared, "train", length)
    references = _references(prepared, plans, seed)
    names: dict[str, None] = {}
    for index in [rows] if isinstance(rows, int) else rows:
        source, row = references[index]
        documents = prepared.sources[source].documents
        names |= dict.fromkeys(documents.document_name(int(i)) for i in plans[source].row(row)["document"])
    return list(names)


def _plans(prepared: Prepared, split: Split, length: int) -> list[Plan]:
    return [prepared.plan(index, split, length) for index in range(len(prepared.sources))]


def _references(prepared: Prepared, plans: Sequence[Plan], seed: int) -> Any:
    for name, plan in zip(prepared.source_names, plans, strict=True):
        if not len(plan):
            raise UserError(f"the source {name} has no training documents: lower held_out or give more documents")
    endless = [_endless(i, len(plan), seed, prepared.config.shuffle) for i, plan in enumerate(plans)]
    if len(endless) == 1:
        return endless[0]
    return grain.MapDataset.mix(endless, [source.weight for source in prepared.sources])


def _endless(source: int, rows: int, seed: int, shuffle: bool) -> Any:
    dataset = grain.MapDataset.range(rows)
    if shuffle:
        # Hashed, because Grain adds the epoch to the seed: seeds 0 and 1 would share all their orders but
        # one.
        hashed = hashlib.sha256(f"{seed}/{source}".encode()).digest()
        dataset = dataset.shuffle(seed=int.from_bytes(hashed[:4], "little"))
    return dataset.repeat().map(lambda row: RowReference(source, int(row)))
