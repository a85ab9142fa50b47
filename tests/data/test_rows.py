import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from lmx.data.packing import Plan
from lmx.data.prepare import Prepared, prepare
from lmx.data.rows import FEW, _shuffled, documents_of, epoch_rows, held_out_rows, spread, train_rows
from lmx.errors import UserError
from tests.data.conftest import config_of, write_corpus

LENGTH = 48


def key(row: dict[str, np.ndarray]) -> bytes:
    return row["tokens"].tobytes() + row["targets"].tobytes()


def segments(row: dict[str, np.ndarray]) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, targets, positions) of each segment of a row."""
    parts = []
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        inside = row["segment_ids"] == segment
        assert inside.any()
        parts.append(tuple(row[k][inside].tolist() for k in ("tokens", "targets", "positions")))
    return parts


@pytest.mark.parametrize("packing", ["best_fit", "split"])
def test_rows_hold_every_document_and_predict_each_token_once(prepared: Prepared, packing: str) -> None:
    data = dataclasses.replace(prepared, config=dataclasses.replace(prepared.config, packing=packing))
    rows = train_rows(data, length=LENGTH, seed=0)
    count = epoch_rows(data, length=LENGTH)["local_files"]
    end, seen = data.tokenizer.end_id, Counter[tuple[int, ...]]()
    pieces: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for index in range(count):
        row = rows[index]
        assert all(row[k].shape == (LENGTH,) and row[k].dtype == np.int32 for k in row)
        filled = int((row["segment_ids"] > 0).sum())
        assert (row["segment_ids"][filled:] == 0).all()
        assert (np.diff(row["segment_ids"][:filled]) >= 0).all()
        for tokens, targets, positions in segments(row):
            assert positions == list(range(len(tokens)))
            assert tokens[1:] == targets[:-1]
            pieces[(tuple(tokens), tuple(targets))] += 1
            if tokens[0] == end and targets[-1] == end:
                seen[tuple(targets[:-1])] += 1
    encoded = [data.tokenizer.encode(text) for text in data.texts("train")]
    expected = Counter(t for ids in encoded for t in [*ids, end])
    assert Counter(t for (_, targets), n in pieces.items() for t in targets * n) == expected
    if packing == "best_fit":
        assert seen == Counter(tuple(ids) for ids in encoded if len(ids) < LENGTH)


def test_each_row_comes_once_an_epoch_in_a_new_order(prepared: Prepared) -> None:
    rows = train_rows(prepared, length=LENGTH, seed=0)
    count = epoch_rows(prepared, length=LENGTH)["local_files"]
    epochs = [[key(rows[e * count + i]) for i in range(count)] for e in range(3)]
    assert len(set(epochs[0])) == count
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    other = train_rows(prepared, length=LENGTH, seed=1)
    assert [key(other[i]) for i in range(count)] not in epochs


@pytest.mark.parametrize("rows", [1, 2, 8, FEW, FEW + 1])
def test_few_rows_and_many_come_once_an_epoch_in_orders_of_their_own(rows: int) -> None:
    numbers, other = _shuffled(rows, "0/0"), _shuffled(rows, "1/0")
    epochs = [[int(numbers[epoch * rows + i]) for i in range(rows)] for epoch in (0, 1, 2, 10**9)]
    assert all(sorted(order) == list(range(rows)) for order in epochs)
    assert epochs[0] == [int(_shuffled(rows, "0/0")[i]) for i in range(rows)]
    if rows >= 8:
        assert len({tuple(order) for order in (*epochs, [int(other[i]) for i in range(rows)])}) == 5


def test_rows_are_the_same_in_any_order_and_process(mixture: Prepared) -> None:
    one, two = (train_rows(mixture, length=LENGTH, seed=3) for _ in range(2))
    indices = [5000, 3, 77, 0, 10**12, 3]
    assert [key(one[i]) for i in indices] == [key(two[i]) for i in indices]
    assert [key(r) for _, r in zip(range(20), iter(one), strict=False)] == [key(two[i]) for i in range(20)]


def test_without_shuffle_rows_follow_the_documents(prepared: Prepared) -> None:
    plain = dataclasses.replace(prepared, config=dataclasses.replace(prepared.config, shuffle=False))
    rows = train_rows(plain, length=LENGTH, seed=0)
    count = epoch_rows(plain, length=LENGTH)["local_files"]
    first = [documents_of(plain, i, length=LENGTH, seed=0)[0] for i in range(count)]
    assert first == sorted(first)
    assert key(rows[0]) == key(rows[count])


def test_a_mixture_keeps_its_weights_and_every_source_its_epochs(mixture: Prepared) -> None:
    rows = train_rows(mixture, length=LENGTH, seed=0)
    epochs = epoch_rows(mixture, length=LENGTH)
    assert list(epochs) == ["local_files", "local_files_2"] == list(mixture.source_names)
    origin = {key(r): n for n, rs in zip(epochs, all_rows(mixture), strict=True) for r in rs}
    drawn = [origin[key(rows[i])] for i in range(8 * max(epochs.values()))]
    for end in range(40, len(drawn), 40):
        assert drawn[:end].count("local_files") == pytest.approx(0.75 * end, abs=1)
    for name, size in epochs.items():
        own = [key(rows[i]) for i, n in enumerate(drawn) if n == name]
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size


def all_rows(data: Prepared) -> list[list[dict[str, np.ndarray]]]:
    from lmx.data.layout import NextTokens
    from lmx.data.rows import build_row

    layout, rng = NextTokens(LENGTH), np.random.default_rng(0)
    plans: list[Plan] = [data.plan(i, "train", LENGTH) for i in range(len(data.sources))]
    both = zip(data.sources, plans, strict=True)
    return [[build_row(s, p, layout, i, rng) for i in range(len(p))] for s, p in both]


def test_held_out_rows_are_finite_and_none_is_trained_on(mixture: Prepared) -> None:
    rows = held_out_rows(mixture, length=LENGTH)
    tokens = Counter(t for row in rows for _, targets, _ in segments(row) for t in targets)
    end = mixture.tokenizer.end_id
    texts = list(mixture.texts("held_out"))
    assert tokens == Counter(t for text in texts for t in [*mixture.tokenizer.encode(text), end])
    assert [key(r) for r in rows] == [key(r) for r in held_out_rows(mixture, length=LENGTH)]
    trained = {key(r) for rs in all_rows(mixture) for r in rs}
    assert not trained & {key(r) for r in rows}


def test_rows_know_their_documents(mixture: Prepared, corpus: Path) -> None:
    rows = train_rows(mixture, length=LENGTH, seed=0)
    for index in (0, 1, 2, 3, 99):
        names = documents_of(mixture, index, length=LENGTH, seed=0)
        texts = [Path(name).read_text(encoding="utf-8") for name in names]
        row = rows[index]
        for tokens, targets, _ in segments(row):
            piece = mixture.tokenizer.decode([*tokens, targets[-1]]).strip("\ufffd")
            assert any(piece in text for text in texts)
    several = documents_of(mixture, [0, 1, 0], length=LENGTH, seed=0)
    assert len(several) == len(set(several))


def test_nothing_held_out_is_said(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=4)
    data = prepare(config_of(corpus, tmp_path / "cache", held_out=0.0), progress=False)
    with pytest.raises(UserError, match=r"held_out is 0.0 and there are no held-out documents"):
        held_out_rows(data, length=LENGTH)
    with pytest.raises(UserError, match="row length is 0"):
        train_rows(data, length=0, seed=0)


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=2)
    data = prepare(config_of(corpus, tmp_path / "cache", held_out=1 - 1e-12), progress=False)
    with pytest.raises(UserError, match="local_files has no training documents"):
        train_rows(data, length=LENGTH, seed=0)


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(10, 3, [0, 3, 6]), (10, 6, [0, 1, 3, 5, 6, 8]), (10, 0, 10), (10, 12, 10), (7, 7, 7)],
)
def test_some_rows_are_from_all_over(count: int, wanted: int, expected: Any) -> None:
    found = list(spread(grain.MapDataset.range(count), wanted))
    assert found == (list(range(expected)) if isinstance(expected, int) else expected)
