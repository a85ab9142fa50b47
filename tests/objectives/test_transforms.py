"""Each transform against a slow, plain one written from its paper; the drawn numbers are the same, the code is not."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import FEW, SEEDS, TEXT, VOCAB, nobody, piece, vocabulary

from lmx.data.layout import Piece
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
from lmx.objectives.objective import Objective
from lmx.objectives.random_rows import random_layout, random_rows
from lmx.objectives.vocabulary import Vocabulary

T5_SPEC = T5(
    vocab=VOCAB, context=64, width=16, encoder_layers=1, decoder_layers=1, heads=2, head_dim=8, hidden=32
).spec()
GPT2 = Gpt2(vocab=VOCAB, context=64, layers=1, width=16, heads=2).spec()


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
