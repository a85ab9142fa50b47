"""Each transform against a slow, plain one written from its paper; the drawn numbers are the same, the code is not."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.data.layout import Piece
from lmx.models.families.bert import Bert
from lmx.models.families.gpt2 import Gpt2
from lmx.models.families.t5 import T5
from lmx.objectives.denoising import (
    UL2,
    Denoisers,
    PrefixDenoiser,
    PrefixLm,
    SpanCorruption,
    SpanDenoiser,
    partition,
    sentinel,
)
from lmx.objectives.fill_in_the_middle import FillInTheMiddle
from lmx.objectives.masked_lm import MaskedLm, Nsp
from lmx.objectives.masking import Chosen, Masking, Replacing, Spans, WholeWords
from lmx.objectives.objective import Objective
from lmx.objectives.random_rows import random_layout, random_rows
from lmx.objectives.sentences import SentenceOrder
from lmx.objectives.vocabulary import Vocabulary

SEEDS = st.integers(0, 2**32)
FEW = settings(max_examples=60, deadline=None)
VOCAB = 250
BERT = Bert(vocab=VOCAB, context=64, layers=1, width=16, heads=2, hidden=32, task="pretraining").spec()
T5_SPEC = T5(
    vocab=VOCAB, context=64, width=16, encoder_layers=1, decoder_layers=1, heads=2, head_dim=8, hidden=32
).spec()
GPT2 = Gpt2(vocab=VOCAB, context=64, layers=1, width=16, heads=2).spec()
TEXT = st.lists(st.integers(120, VOCAB - 1), min_size=1, max_size=60).map(lambda tokens: np.array(tokens, np.int32))


def vocabulary(objective: Objective) -> Vocabulary:
    return Vocabulary.invented(VOCAB, objective.special_tokens)


def nobody(rng: np.random.Generator) -> np.ndarray | None:
    return None


def piece(text: np.ndarray) -> Piece:
    """A whole document: end, text, end."""
    return Piece(np.concatenate([[0], text, [0]]).astype(np.int32))


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
def test_half_of_the_pairs_have_a_second_part_from_elsewhere(text: np.ndarray, others: np.ndarray, seed: int) -> None:
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
    swapped = SentenceOrder().text(piece(text), vocabulary(objective), np.random.default_rng(seed), nobody)
    body = swapped.tokens[swapped.maskable].tolist()
    assert sorted(body) == sorted(text.tolist())


@FEW
@given(st.integers(1, 40), st.data(), SEEDS)
def test_partitions_have_positive_parts_that_sum_to_the_total(total: int, data: st.DataObject, seed: int) -> None:
    parts = data.draw(st.integers(1, total))
    found = partition(total, parts, np.random.default_rng(seed))
    assert len(found) == parts
    assert found.min() >= 1
    assert found.sum() == total


def test_every_partition_is_as_likely() -> None:
    rng = np.random.default_rng(0)
    counts = Counter(tuple(partition(6, 3, rng).tolist()) for _ in range(10_000))
    assert len(counts) == 10
    assert max(counts.values()) < 1.2 * min(counts.values())


@FEW
@given(TEXT.filter(lambda t: len(t) > 1), st.floats(0.05, 0.9), st.floats(1, 8), SEEDS)
def test_span_corruption_is_the_papers(text: np.ndarray, density: float, span: float, seed: int) -> None:
    denoiser = SpanDenoiser(density=density, span=span)
    noise, spans = denoiser.numbers(len(text))
    assert noise == min(max(round(len(text) * density), 1), len(text) - 1)
    rng = np.random.default_rng(seed)
    kept, lost = partition(len(text) - noise, spans, rng), partition(noise, spans, rng)
    source, target, at = list[int](), list[int](), 0
    for i in range(spans):
        source += [*text[at : at + kept[i]].tolist(), 1 + i]
        at += kept[i]
        target += [1 + i, *text[at : at + lost[i]].tolist()]
        at += lost[i]
    found = denoiser.corrupted(text, np.arange(1, 101), np.random.default_rng(seed))
    assert (found[0].tolist(), found[1].tolist()) == (source, target)
    assert (len(source), len(target)) == denoiser.sizes(len(text))[0]


@FEW
@given(st.sampled_from([SpanCorruption(), Denoisers(), PrefixLm()]), SEEDS)
def test_packed_sources_and_targets_give_the_text_back(objective: Objective, seed: int) -> None:
    layout = random_layout(objective, T5_SPEC, 64)
    rng = np.random.default_rng(seed)
    pieces, room = list[Piece](), 64
    while (count := min(int(rng.integers(1, 40)), int((layout.rooms <= room).sum()) - 1)) > 0:
        pieces.append(piece(rng.integers(120, VOCAB, max(count - 1, 1), np.int32)))
        room -= int(layout.rooms[max(count, 2)]) if count > 1 else 64
        if room < 0:
            pieces.pop()
            break
    row = layout.row(pieces, rng, nobody)
    segment = 0
    for text in (p.body.tolist() for p in pieces if len(p.body) > 1):
        segment += 1
        source = row["tokens"][row["segment_ids"] == segment].tolist()
        target = row["targets"][row["target_segments"] == segment].tolist()
        read = row["decoder_tokens"][row["target_segments"] == segment].tolist()
        assert read == [0, *target[:-1]]
        assert source[-1] == target[-1] == 0
        assert restored(source[:-1], target[:-1], vocabulary(objective)) == text
    assert row["segment_ids"].max() == row["target_segments"].max() == segment


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_a_text_is_cut_where_the_mean_share_of_targets_is_right(share: float) -> None:
    denoiser, text, rng = PrefixDenoiser(share=share), np.arange(40), np.random.default_rng(0)
    found = [denoiser.corrupted(text, text, rng) for _ in range(4000)]
    assert all([*source, *target] == text.tolist() for source, target in found)
    counts = Counter(len(target) for _, target in found)
    assert sum(size * times for size, times in counts.items()) / 4000 == pytest.approx(40 * share, abs=0.6)
    assert [(40 - size, size) for size in (min(counts), max(counts))] == denoiser.sizes(40)
    assert max(counts.values()) < 2 * min(counts.values())


def test_a_mixture_is_drawn_by_weight_and_tells_which_it_was() -> None:
    """UL2's table: mean span and corrupted share by mode token; the suffix of a text is one span of a quarter of it."""
    spans = [(d.token, d.span, d.density) for d in UL2 if isinstance(d, SpanDenoiser)]
    assert spans[:2] == [("[NLU]", 3, 0.15), ("[NLU]", 8, 0.15)]
    assert spans[2:] == [("[NLG]", 3, 0.5), ("[NLG]", 8, 0.5), ("[NLG]", 64, 0.15), ("[NLG]", 64, 0.5)]
    objective = Denoisers(denoisers=(replace(UL2[0], weight=3.0), UL2[-1]), sentinels=100)
    vocab = vocabulary(objective)
    maker, text, rng = objective.maker(vocab), np.arange(120, 240, dtype=np.int32), np.random.default_rng(0)
    found = [maker.pair(piece(text), rng) for _ in range(2000)]
    modes = Counter(int(pair[0][0]) for pair in found if pair)
    assert modes.keys() == {vocab.special["[NLU]"], vocab.special["[S2S]"]}
    assert modes[vocab.special["[NLU]"]] / 2000 == pytest.approx(0.75, abs=0.03)
    suffixes = [len(target) - 1 for source, target in filter(None, found) if source[0] == vocab.special["[S2S]"]]
    assert np.mean(suffixes) / 120 == pytest.approx(0.25, abs=0.02)


def restored(source: list[int], target: list[int], vocab: Vocabulary) -> list[int]:
    """The text of a source and a target: each sentinel of the source gives way to what follows it in the target."""
    sentinels = {index for name, index in vocab.special.items() if name.startswith("<extra")}
    modes = set(vocab.special.values()) - sentinels
    source = [token for token in source if token not in modes]
    if not sentinels & set(source):
        return source + target
    spans, current = dict[int, list[int]](), list[int]()
    for token in target:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in source for t in (spans[token] if token in sentinels else [token])]


@FEW
@given(TEXT, SEEDS)
def test_filling_in_the_middle_moves_the_middle_to_the_end(text: np.ndarray, seed: int) -> None:
    objective = FillInTheMiddle(rate=1.0)
    vocab = vocabulary(objective)
    layout = objective.layout(vocab, GPT2, 80)
    row = layout.row([piece(text)], np.random.default_rng(seed), nobody)
    tokens = row["tokens"][row["segment_ids"] > 0].tolist()
    pre, suf, mid = (vocab.special[name] for name in objective.special_tokens)
    assert tokens[:2] == [0, pre]
    assert row["targets"][len(tokens) - 1] == 0
    rng = np.random.default_rng(seed)
    rng.random()
    a, b = sorted(rng.integers(0, len(text) + 1, 2).tolist())
    prefix, middle, suffix = text[:a].tolist(), text[a:b].tolist(), text[b:].tolist()
    psm = [0, pre, *prefix, suf, *suffix, mid, *middle]
    spm = [0, pre, suf, *suffix, mid, *prefix, *middle]
    assert tokens == (spm if rng.random() < 0.5 else psm)


@pytest.mark.parametrize("objective", [SpanCorruption(), Denoisers(), PrefixLm()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("spec", [T5_SPEC, GPT2], ids=["encoder-decoder", "decoder"])
def test_any_pieces_that_the_plan_puts_together_fit(objective: Objective, spec: object) -> None:
    for seed in range(20):
        random_rows(objective, spec, 8, 64, (seed,))  # type: ignore[arg-type]


def test_t5_rows_of_512_take_568_tokens_and_114_targets() -> None:
    """The numbers of T5's own configuration (its inputs have 512 tokens with the end, its targets 114)."""
    denoiser = SpanDenoiser()
    longest = max(n for n in range(2, 1000) if denoiser.sizes(n)[0][0] + 1 <= 512)
    assert (longest, denoiser.sizes(longest)[0][1] + 1) == (568, 114)
    assert SpanCorruption().special_tokens[:2] == (sentinel(0), sentinel(1)) == ("<extra_id_0>", "<extra_id_1>")
