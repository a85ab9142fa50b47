"""Counts of prepared data: what is in a source, and what packing makes of it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmx.data import packing
from lmx.data.layout import Layout

if TYPE_CHECKING:
    from lmx.data.prepare import PreparedSource


def counts(source: "PreparedSource") -> dict[str, Any]:
    """What a source holds, packed or not."""
    out = source.chosen("held_out")
    lengths, sizes = np.asarray(source.tokens.lengths), np.asarray(source.documents.sizes)
    return {
        "weight": source.weight,
        "documents": int((sizes > 0).sum()),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "bytes": int(sizes.sum()),
        "dropped": source.documents.dropped,
        "held_out_documents": len(out),
        "held_out_tokens": int(lengths[out].sum(dtype=np.int64)),
        "held_out_bytes": int(sizes[out].sum()),
    }


def losses(source: "PreparedSource", layout: Layout, plans: Sequence[packing.Plan]) -> list[str]:
    """Sentences about the examples of a source that are not learned as they are."""
    cut, dropped, untaught = (sum(getattr(plan, name) for plan in plans) for name in ("cut", "dropped", "untaught"))
    what = "split into several" if layout.whole and layout.whole.longer == "split" else "truncated"
    total = sum(len(source.chosen(split)) for split in ("train", "held_out"))
    told = [f"{count} of {total} are {became}" for count, became in ((cut, what), (dropped, "left out")) if count]
    notes = [f"{' and '.join(told)}: longer than a row"] if told else []
    if untaught:
        notes.append(f"{untaught} of {total} are left out: truncated to a row, they hold nothing to learn")
    if source.documents.dropped:
        notes.append(f"{source.documents.dropped} without content are left out")
    return [f"of the examples of {source.name}, {note}" for note in notes]


def packed(train: packing.Plan, held_out: packing.Plan, layout: Layout | int) -> dict[str, Any]:
    """What the plans of a source come to in their layout."""
    truncates = isinstance(layout, Layout) and layout.whole is not None and layout.whole.longer == "truncate"
    missing = {"left_out": train.dropped + held_out.dropped, "untaught": train.untaught + held_out.untaught}
    return {
        "rows": len(train),
        "held_out_rows": len(held_out),
        "truncated": train.cut + held_out.cut if truncates else 0,
        "cut": 0 if truncates else train.cut,
        **{name: count for name, count in missing.items() if count},
        "padding": round(train.padding, 6),
    }


def in_words(name: str, found: Mapping[str, Any]) -> str:
    """What :func:`counts` and :func:`packed` found of a source, as a sentence."""
    return (
        f"{name}: {found['documents']:,} documents ({found['held_out_documents']:,} held out), {found['tokens']:,} "
        f"tokens in {found['rows'] + found['held_out_rows']:,} rows, {found['dropped'] + found.get('left_out', 0):,} "
        f"dropped, {found['truncated']:,} truncated, {found['padding']:.2%} padding"
    )
