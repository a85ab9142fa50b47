"""Rows: random-access training examples of a fixed length, in any order, at any position.

A row is a dict of int32 arrays, those of a :class:`~lmx.data.layout.Layout`. Where one is taken, a length stands for
the layout of next-token prediction.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from lmx.data.layout import KEYS as KEYS
from lmx.data.layout import Layout, NextTokens, Piece, Row
from lmx.data.packing import Plan
from lmx.data.prepare import Prepared, PreparedSource
from lmx.data.splits import Split
from lmx.errors import UserError

TRIES = 16
"""Draws of a piece of another document, before there is said to be none."""
FEW = 64
"""Up to so many rows, an epoch's order is drawn at once. Grain draws each row's place among 65,536 until it is one of
theirs: of 8 rows, 2 ms for each."""


class RowReference(NamedTuple):
    """A row of one source: their numbers, and how often the source's rows were all read before."""

    source: int
    row: int
    epoch: int = 0


def build_row(source: PreparedSource, plan: Plan, layout: Layout, index: int, rng: np.random.Generator) -> Row:
    """Row ``index`` of a plan; what is random in it is drawn from ``rng``."""
    found = plan.row(index)
    pieces = [_piece(source, piece) for piece in found.tolist()]
    inside = set(found["document"].tolist())

    def other(rng: np.random.Generator) -> np.ndarray | None:
        for _ in range(TRIES):
            piece = plan.pieces[int(rng.integers(len(plan.pieces)))]
            if int(piece["document"]) not in inside:
                return _piece(source, piece.tolist()).body
        return None

    return layout.row(pieces, rng, other)


def _piece(source: PreparedSource, piece: tuple[int, int, int]) -> Piece:
    document, start, count = piece
    length = int(source.tokens.lengths[document])
    if source.targets is not None:
        target = source.targets.stream(document, 1, int(source.targets.lengths[document]))
        labels = None if source.labels is None else source.labels.values(document)
        return Piece(source.tokens.stream(document, start + 1, count), document, True, True, target, labels, start)
    stream = source.tokens.stream(document, start, count + 1)
    return Piece(stream, document, start == 0, start + count == length + 1)


def _generator(*parts: object) -> np.random.Generator:
    """A generator for these parts alone: the same in any process and on any machine."""
    hashed = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(hashed[:16], "little"))


def padding_row(length: int) -> Row:
    """A row of next-token prediction that holds nothing: all zero."""
    return NextTokens(length).empty()


def train_rows(prepared: Prepared, *, length: Layout | int, seed: int) -> grain.MapDataset:
    """The endless training mixture: row ``i`` of the run, random access, the same on every machine.

    Sources are interleaved by weight; each gives every one of its rows once per epoch of its own, in a new
    order each epoch if the configuration shuffles.

    Raises:
      UserError: a source has no training rows.
    """
    plans, layout = _plans(prepared, "train", length), _layout(length)

    def read(reference: RowReference) -> Row:
        rng = _generator(seed, *reference)
        return build_row(prepared.sources[reference.source], plans[reference.source], layout, reference.row, rng)

    return _references(prepared, plans, seed).map(read)


def held_out_rows(prepared: Prepared, *, length: Layout | int) -> grain.MapDataset:
    """All held-out rows, source after source, in a fixed order, and the same in every evaluation.

    Raises:
      UserError: there are none.
    """
    plans, layout = _plans(prepared, "held_out", length), _layout(length)
    ends = np.cumsum([len(plan) for plan in plans])
    if not ends[-1]:
        _check_fits(prepared, plans, "held-out")
        raise UserError(
            f"held_out is {prepared.config.held_out} and there are no held-out documents: raise held_out, or give more "
            'documents (a text file becomes several with split="paragraphs")'
        )

    def read(index: int) -> Row:
        source = int(np.searchsorted(ends, index, side="right"))
        first = int(ends[source]) - len(plans[source])
        rng = _generator("held_out", source, index - first)
        return build_row(prepared.sources[source], plans[source], layout, index - first, rng)

    return grain.MapDataset.range(int(ends[-1])).map(read)


def spread(rows: grain.MapDataset, wanted: int) -> grain.MapDataset:
    """``wanted`` of the rows, evenly from all over them: the first ones may all be of one kind. 0 is all of them."""
    count = len(rows)
    if not 0 < wanted < count:
        return rows
    return grain.MapDataset.range(wanted).map(lambda index: rows[index * count // wanted])


def epoch_rows(prepared: Prepared, *, length: Layout | int) -> dict[str, int]:
    """Training rows in one epoch of each source."""
    plans = _plans(prepared, "train", length)
    return {name: len(plan) for name, plan in zip(prepared.source_names, plans, strict=True)}


def documents_of(prepared: Prepared, rows: int | Sequence[int], *, length: Layout | int, seed: int) -> list[str]:
    """The names of the documents in training rows of :func:`train_rows`, each once, in order."""
    plans = _plans(prepared, "train", length)
    references = _references(prepared, plans, seed)
    names: dict[str, None] = {}
    for index in [rows] if isinstance(rows, int) else rows:
        source, row, _ = references[index]
        documents = prepared.sources[source].documents
        names |= dict.fromkeys(documents.document_name(int(i)) for i in plans[source].row(row)["document"])
    return list(names)


def _layout(length: Layout | int) -> Layout:
    return NextTokens(length) if isinstance(length, int) else length


def _plans(prepared: Prepared, split: Split, length: Layout | int) -> list[Plan]:
    return [prepared.plan(index, split, length) for index in range(len(prepared.sources))]


def _references(prepared: Prepared, plans: Sequence[Plan], seed: int) -> Any:
    _check_fits(prepared, plans, "training")
    for name, plan in zip(prepared.source_names, plans, strict=True):
        if not len(plan):
            raise UserError(f"the source {name} has no training documents: lower held_out or give more documents")
    endless = [_endless(i, len(plan), seed, prepared.config.shuffle) for i, plan in enumerate(plans)]
    if len(endless) == 1:
        return endless[0]
    return grain.MapDataset.mix(endless, [source.weight for source in prepared.sources])


def _check_fits(prepared: Prepared, plans: Sequence[Plan], what: str) -> None:
    """Raises UserError for a source all of whose examples are left out because of their length."""
    for name, plan in zip(prepared.source_names, plans, strict=True):
        if plan.dropped and not len(plan):
            raise UserError(
                f"all {plan.dropped} {what} examples of the source {name} take more than the {plan.length} positions "
                "of a row, and are left out: raise train.length, or let objective.longer keep them"
            )
        if plan.untaught and not len(plan):
            raise UserError(
                f"all {plan.untaught} {what} examples of the source {name} hold nothing to learn once they are "
                f"truncated to the {plan.length} positions of a row: raise train.length"
            )


def _endless(source: int, rows: int, seed: int, shuffle: bool) -> Any:
    """The references to a source's rows, epoch after epoch."""
    numbers = _shuffled(rows, f"{seed}/{source}") if shuffle else grain.MapDataset.range(rows).repeat()
    return numbers.map_with_index(lambda index, row: RowReference(source, int(row), int(index) // rows))


def _shuffled(rows: int, seed: str) -> grain.MapDataset:
    """The numbers of some rows again and again, each epoch in an order of its own."""
    if rows > FEW:
        # Hashed, because Grain adds the epoch to the seed: seeds 0 and 1 would share all their orders but one.
        hashed = hashlib.sha256(seed.encode()).digest()
        return grain.MapDataset.range(rows).shuffle(seed=int.from_bytes(hashed[:4], "little")).repeat()
    order = functools.lru_cache(2)(lambda epoch: _generator(seed, epoch).permutation(rows))
    return grain.MapDataset.range(rows).repeat().map_with_index(lambda index, row: order(index // rows)[row])
