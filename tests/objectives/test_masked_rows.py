"""Masked rows and pairs of sentences against slow, plain ones; the drawn numbers are the same, the code is not."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import FEW, SEEDS, TEXT, VOCAB, nobody, piece, vocabulary

from lmx.models.families.bert import Bert
from lmx.objectives.masked_lm import MaskedLm, Nsp
from lmx.objectives.masking import Chosen, Masking, Replacing, Spans, WholeWords
from lmx.objectives.sentences import NextSentence, SentenceOrder

BERT = Bert(vocab=VOCAB, context=64, layers=1, width=16, heads=2, hidden=32, task="pretraining").spec()


@FEW
@given(TEXT, st.data(), st.integers(0, 12), SEEDS)
def test_whole_words_are_taken_wholly_or_not_at_all(
    text: np.ndarray, data: st.DataObject, budget: int, seed: int
) -> None:
    flags = st.lists(st.booleans(), min_size=len(text), max_size=len(text))
    starts, allowed = np.array(data.draw(flags)), np.array(data.draw(flags))
    words: list[list[int]] = []
    for i in range(len(text)):
        if allowed[i]:
            if not words or starts[i] or words[-1][-1] != i - 1:
                words.append([])
            words[-1].append(i)
    expected: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(words)):
        if len(expected) + len(words[index]) <= budget:
            expected += words[index]
    found = WholeWords().chosen(lambda: starts, allowed, budget, np.random.default_rng(seed))
    assert found.places.tolist() == sorted(expected)


@FEW
@given(TEXT, st.data(), st.integers(0, 20), SEEDS)
def test_spans_are_runs_of_words_within_the_budget(
    text: np.ndarray, data: st.DataObject, budget: int, seed: int
) -> None:
    starts = np.array(data.draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text))))
    words: list[list[int]] = []
    for i in range(len(text)):
        if i == 0 or starts[i]:
            words.append([])
        words[-1].append(i)
    rng, expected = np.random.default_rng(seed), dict[int, int]()
    for unit in range(10 * len(words)):
        length = min(rng.geometric(0.2), 10, len(words))
        first = rng.integers(len(words) - length + 1)
        if len(expected) == budget:
            break
        run = [place for word in words[first : first + length] for place in word]
        if not any(place in expected for place in run):
            for place in run[: budget - len(expected)]:
                expected[place] = unit
    allowed = np.ones(len(text), bool)
    places, units = Spans().chosen(lambda: starts, allowed, budget, np.random.default_rng(seed))
    assert dict(zip(places.tolist(), units.tolist(), strict=True)) == expected


@FEW
@given(TEXT, st.integers(0, 20), SEEDS)
def test_replacing_is_eighty_ten_ten_by_unit(text: np.ndarray, count: int, seed: int) -> None:
    places = np.arange(min(count, len(text)))
    units = places // 2
    rng = np.random.default_rng(seed)
    lots = rng.random(len(set(units.tolist())))
    noise = rng.integers(0, VOCAB, len(places))
    expected = text.tolist()
    for i, place in enumerate(places):
        lot = lots[units[i]]
        if lot < 0.8:
            expected[place] = 1
        elif lot < 0.9:
            expected[place] = noise[i]
    found = Replacing().replaced(text, Chosen(places, units), 1, VOCAB, np.random.default_rng(seed))
    assert found.tolist() == expected


def test_the_shares_of_masks_random_and_kept_tokens_are_those_of_the_paper() -> None:
    tokens, places = np.full(100_000, 7), np.arange(100_000)
    found = Replacing().replaced(tokens, Chosen(places, places), 1, 10**6, np.random.default_rng(0))
    assert (found == 1).mean() == pytest.approx(0.8, abs=0.01)
    assert (found == 7).mean() == pytest.approx(0.1, abs=0.01)


@FEW
@given(st.lists(TEXT, min_size=1, max_size=4), st.sampled_from([Masking(), WholeWords(), Spans()]), SEEDS)
def test_masked_rows_can_be_undone(texts: list[np.ndarray], masking: Masking, seed: int) -> None:
    """Putting the targets back at their slots gives the packed documents; 15% of each are predicted."""
    objective = MaskedLm(masking=masking)
    layout = objective.layout(vocabulary(objective), BERT, 256)
    row = layout.row([piece(t) for t in texts], np.random.default_rng(seed), nobody)
    real = row["target_segments"] > 0
    tokens = row["tokens"].copy()
    tokens[row["slots"][real]] = row["targets"][real]
    whole = [token for text in texts for token in (0, *text.tolist())]
    assert tokens.tolist() == whole + [0] * (256 - len(whole))
    assert (row["segment_ids"][row["slots"][real]] == row["target_segments"][real]).all()
    assert len(set(row["slots"][real].tolist())) == real.sum()
    counts = Counter(row["target_segments"][real].tolist())
    for segment, text in enumerate(texts, start=1):
        wanted = max(1, round(0.15 * len(text)))
        assert counts[segment] == wanted if masking != WholeWords() else counts[segment] <= wanted
    outside = np.setdiff1d(np.arange(len(whole)), row["slots"][real])
    assert row["tokens"][outside].tolist() == [whole[i] for i in outside]


@FEW
@given(TEXT, TEXT, SEEDS)
def test_a_second_part_is_the_texts_own_or_from_elsewhere(text: np.ndarray, others: np.ndarray, seed: int) -> None:
    objective = Nsp(rate=1e-9)
    layout = objective.layout(vocabulary(objective), BERT, 128)
    mask, start, end = (vocabulary(objective).special[t] for t in ("[MASK]", "[CLS]", "[SEP]"))
    row = layout.row([piece(text)], np.random.default_rng(seed), lambda rng: others)
    tokens = row["tokens"].copy()
    real = row["target_segments"] > 0
    tokens[row["slots"][real]] = row["targets"][real]
    tokens = tokens[row["segment_ids"] > 0]
    assert tokens[0] == start
    assert tokens[-1] == end
    assert mask not in tokens
    middle = tokens.tolist().index(end)
    first, second = tokens[1:middle].tolist(), tokens[middle + 1 : -1].tolist()
    assert first == text.tolist()[: len(first)]
    assert row["types"][: len(tokens)].tolist() == [0] * (len(first) + 2) + [1] * (len(tokens) - len(first) - 2)
    if row["answers"][0] == 0:
        assert len(text) == 1
        assert not second
    elif row["answers"][0] == 1:
        assert first + second == text.tolist()
    else:
        joined = ",".join(map(str, others.tolist()))
        assert ",".join(map(str, second)) in joined


@FEW
@given(TEXT, SEEDS)
def test_neighbours_stand_in_order_or_are_exchanged(text: np.ndarray, seed: int) -> None:
    vocab = vocabulary(Nsp())
    found = SentenceOrder().text(piece(text), vocab.frames(before=True), np.random.default_rng(seed), nobody)
    middle = found.tokens.tolist().index(vocab.special["[SEP]"])
    first, second = found.tokens[1:middle].tolist(), found.tokens[middle + 1 : -1].tolist()
    assert found.answer in ((1, 2) if len(text) > 1 else (0,))
    assert (second + first if found.answer == 2 else first + second) == text.tolist()
    assert found.answer == 0 or len(text) // 4 <= min(len(first), len(second))
    assert found.tokens[found.maskable].tolist() == first + second


@pytest.mark.parametrize("sentences", [NextSentence(), SentenceOrder()], ids=lambda s: type(s).__name__)
def test_half_of_the_pairs_are_as_they_stand(sentences: SentenceOrder) -> None:
    rng, vocab = np.random.default_rng(0), vocabulary(Nsp())
    text, others = piece(np.arange(120, 140)), np.arange(200, 230)
    frames = vocab.frames(before=True)
    answers = Counter(sentences.text(text, frames, rng, lambda rng: others).answer for _ in range(4000))
    assert answers.keys() == {1, 2}
    assert answers[1] / 4000 == pytest.approx(0.5, abs=0.03)
