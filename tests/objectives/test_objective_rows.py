"""Objectives on prepared data: the same batches however they are read, and clear words where something does not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lmx.data.config import AlignedFiles, DataConfig, Docstrings, TokenizerFile
from lmx.data.layout import Piece
from lmx.data.loader import Loader
from lmx.data.prepare import prepare
from lmx.data.rows import held_out_rows, train_rows
from lmx.data.tokenizer import TextTokenizer, load_tokenizer, train_bpe
from lmx.errors import UserError
from lmx.experiment import Experiment, TrainConfig
from lmx.models.config import ModelConfig
from lmx.models.families.bert import Bert
from lmx.models.families.gpt2 import Gpt2
from lmx.models.families.t5 import T5
from lmx.objectives.classification import Classification
from lmx.objectives.denoising import Denoisers, PrefixDenoiser, PrefixLm, SpanCorruption
from lmx.objectives.fill_in_the_middle import FillInTheMiddle
from lmx.objectives.labelled import ExampleRows
from lmx.objectives.masked_lm import MaskedLm, Nsp
from lmx.objectives.masking import Replacing, WholeWords
from lmx.objectives.next_token import NextToken
from lmx.objectives.objective import Objective
from lmx.objectives.seq_to_seq import SeqToSeq
from lmx.objectives.vocabulary import Vocabulary

BERT = Bert(vocab=384, context=64, layers=1, width=16, heads=2, hidden=32, task="pretraining")
SIZES: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "heads": 2, "head_dim": 8, "hidden": 32}
ENCODER_DECODER = T5(vocab=384, context=64, width=16, **SIZES)
GPT2 = Gpt2(vocab=384, context=64, layers=1, width=16, heads=2)
CASES = [
    (Nsp(masking=WholeWords()), BERT),
    (SpanCorruption(sentinels=10), ENCODER_DECODER),
    (PrefixLm(), GPT2),
    (FillInTheMiddle(), GPT2),
    (SeqToSeq(), ENCODER_DECODER),
]


def write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def experiment(objective: Objective, model: ModelConfig, data: DataConfig, **train: Any) -> Experiment:
    settings = TrainConfig(**({"length": 64, "batch": 4} | train))
    return Experiment(model=model, objective=objective, data=data, train=settings)


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("objective", "model"), CASES, ids=[type(o).__name__ for o, _ in CASES])
def test_batches_depend_on_the_step_alone(
    objective: Objective, model: ModelConfig, documents: DataConfig, pairs: DataConfig
) -> None:
    run = experiment(objective, model, pairs if isinstance(objective, SeqToSeq) else documents)
    run.check()
    prepared = prepare(run.corpus, progress=False)
    layout = run.layout(prepared.tokenizer)
    rows, again = (train_rows(prepared, length=layout, seed=0) for _ in range(2))
    epoch = len(prepared.plan(0, "train", layout))
    backwards = {i: again[i] for i in reversed(range(2 * epoch))}
    assert all(same(rows[i], backwards[i]) for i in range(2 * epoch))
    assert not same(rows[0], train_rows(prepared, length=layout, seed=1)[0])
    mesh = jax.make_mesh((4,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with Loader(rows, batch=4) as whole, Loader(again, batch=4, sharding=sharding, start_step=2) as resumed:
        expected = [next(whole) for _ in range(4)]
        for step in (2, 3):
            assert same(expected[step], next(resumed))
    held_out = held_out_rows(prepared, length=layout)
    assert all(same(held_out[i], held_out[i]) for i in range(len(held_out)))
    with Loader(held_out, batch=4) as batches:
        _, weights = objective.scored(list(batches)[-1])
    assert float(weights.sum()) > 0


def test_masks_are_new_in_each_epoch(documents: DataConfig) -> None:
    run = experiment(MaskedLm(), BERT, replace(documents, shuffle=False))
    prepared = prepare(run.corpus, progress=False)
    layout = run.layout(prepared.tokenizer)
    rows, epoch = train_rows(prepared, length=layout, seed=0), len(prepared.plan(0, "train", layout))
    first, later = rows[0], rows[epoch]
    assert np.array_equal(first["segment_ids"], later["segment_ids"])
    assert not np.array_equal(first["slots"], later["slots"])


@pytest.mark.parametrize("kind", ["trained", "bert", "roberta"])
def test_texts_and_pairs_are_framed_as_they_are_when_fine_tuned(kind: str, tmp_path: Path) -> None:
    tokenizer, start, between, end = framing_tokenizer(kind, tmp_path)
    names = ("[MASK]", "[CLS]", "[SEP]")
    vocabulary, text = Vocabulary.of(tokenizer, names), tokenizer.encode("the cat the cat the cat")
    ends = [tokenizer.end_id]
    piece = Piece(np.array([*ends, *text, *ends], np.int32))
    single, pairs = (
        unmasked(objective.layout(vocabulary, BERT.spec(), 64).row([piece], np.random.default_rng(3), lambda rng: None))
        for objective in (MaskedLm(), Nsp())
    )
    whole = [*start, *text, *end]
    assert single == whole == tokenizer.encode_prompts(["the cat the cat the cat"])[0].ids
    cuts = ([*start, *text[:i], *between, *text[i:], *end] for i in range(1, len(text)))
    assert pairs in list(cuts)
    tuned = Classification().layout(vocabulary, replace(BERT, task="sequence_classification").spec(), 64)
    assert isinstance(tuned, ExampleRows)
    assert tuned.framed(Piece(np.array(text, np.int32))).tokens.tolist() == whole


def framing_tokenizer(kind: str, directory: Path) -> tuple[TextTokenizer, list[int], list[int], list[int]]:
    """A tokenizer, and what stands before a text, between two, and at the end."""
    if kind == "trained":
        tokenizer = train_bpe(iter(["the cat " * 20]), 300, ("[MASK]", "[CLS]", "[SEP]"))
        tokenizer.save(directory)
        return load_tokenizer(directory), [2], [3], [3]
    if kind == "bert":
        write(directory / "vocab.txt", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"])
        return load_tokenizer(directory), [2], [3], [3]
    letters = {letter: index for index, letter in enumerate("thecaĠb", start=3)}
    (directory / "vocab.json").write_text(json.dumps({"<s>": 0, "</s>": 1, "<mask>": 2, **letters}))
    write(directory / "merges.txt", ["#version: 0.2"])
    return load_tokenizer(directory), [0], [1, 1], [1]


def unmasked(row: dict[str, np.ndarray]) -> list[int]:
    """The tokens of a row before any was masked."""
    tokens, real = row["tokens"].copy(), row["target_segments"] > 0
    tokens[row["slots"][real]] = row["targets"][real]
    return [int(token) for token in tokens[row["segment_ids"] > 0]]


def test_pairs_come_whole_and_belong_together(pairs: DataConfig) -> None:
    run = experiment(SeqToSeq(target_length=48), ENCODER_DECODER, pairs)
    prepared = prepare(run.corpus, progress=False)
    decode, layout = prepared.tokenizer.decode, run.layout(prepared.tokenizer)
    rows, seen = train_rows(prepared, length=layout, seed=0), set[str]()
    for index in range(len(prepared.plan(0, "train", layout))):
        row = rows[index]
        for segment in range(1, row["segment_ids"].max() + 1):
            source = decode(row["tokens"][row["segment_ids"] == segment])
            assert decode(row["targets"][row["target_segments"] == segment]).split() == source.split()[::-1]
            seen.add(source)
    assert seen == set(prepared.texts("train"))
    assert len(seen) > 30


def test_pairs_that_are_too_long_are_cut_or_left_out_and_counted(pairs: DataConfig) -> None:
    for longer, place in (("truncate", "cut"), ("drop", "dropped")):
        run = experiment(SeqToSeq(longer=longer), ENCODER_DECODER, pairs, length=12)  # type: ignore[arg-type]
        prepared = prepare(run.corpus, progress=False)
        layout = run.layout(prepared.tokenizer)
        plan = prepared.plan(0, "train", layout)
        assert getattr(plan, place) > 0
        chosen = prepared.sources[0].chosen("train")
        assert len(plan.pieces) == len(chosen) - plan.dropped
        rows = train_rows(prepared, length=layout, seed=0)
        assert all((rows[i]["targets"][rows[i]["target_segments"] > 0] >= 0).all() for i in range(len(plan)))


def test_docstrings_are_pairs_of_the_standard_library(tmp_path: Path) -> None:
    from lmx.data.builders import docstrings, files
    from lmx.data.builders.base import Span

    path = next(p for p in files.stdlib_files() if p.endswith("/textwrap.py"))
    found = [r for r in docstrings.Docstrings.records(Docstrings(), Span(path, 1)) if r]
    wrap = next(r for r in found if r["path"].endswith(":dedent"))
    assert wrap["target"] == "Remove any common leading whitespace from every line in `text`."
    assert "def dedent(text):" in wrap["text"]
    assert '"""' not in wrap["text"]


def test_bad_files_and_tokenizers_are_named(pairs: DataConfig, documents: DataConfig, tmp_path: Path) -> None:
    write(tmp_path / "a.txt", ["one", "two"])
    write(tmp_path / "b.txt", ["eins"])
    source = AlignedFiles(files=(str(tmp_path / "a.txt"),), target_files=(str(tmp_path / "b.txt"),))
    with pytest.raises(UserError, match=r"a\.txt has 2 lines but .*b\.txt has 1"):
        prepare(replace(pairs, sources=(source,)), progress=False)
    trained = prepare(documents, progress=False).tokenizer
    trained.save(tmp_path / "tokenizer")
    data = replace(documents, tokenizer=TokenizerFile(str(tmp_path / "tokenizer")))
    run = experiment(MaskedLm(), BERT, data)
    with pytest.raises(UserError, match=r"no token for \[MASK\]"):
        run.layout(prepare(run.corpus, progress=False).tokenizer)
    run = experiment(SeqToSeq(), ENCODER_DECODER, documents)
    prepared = prepare(run.corpus, progress=False)
    layout = run.layout(prepared.tokenizer)
    with pytest.raises(UserError, match="has documents, but the objective learns from pairs"):
        prepared.plan(0, "train", layout)


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        (MaskedLm(), GPT2, "needs a model that sees the whole text, which a gpt2 does not"),
        (Nsp(), replace(BERT, task="token_prediction"), "has no head for pairs"),
        (NextToken(), BERT, "but a bert sees the whole text"),
        (NextToken(), ENCODER_DECODER, "no text for the encoder of a t5"),
        (FillInTheMiddle(), ENCODER_DECODER, "no text for the encoder of a t5"),
        (SpanCorruption(), BERT, "but a bert sees the whole text"),
        (SpanCorruption(sentinels=2), ENCODER_DECODER, "more than objective.sentinels 2"),
        (Denoisers(denoisers=()), ENCODER_DECODER, "objective.denoisers is empty"),
        (
            Denoisers(denoisers=(PrefixDenoiser(share=1.0),)),
            ENCODER_DECODER,
            "denoisers.0.share is 1.0, expected above 0 and",
        ),
        (
            MaskedLm(replacing=Replacing(mask=0.8, random=0.3)),
            replace(BERT, task="token_prediction"),
            "shares mask 0.8 and random 0.3, expected at most 1 together",
        ),
        (SeqToSeq(target_length=99), ENCODER_DECODER, "target_length is 99"),
        (SeqToSeq(), replace(GPT2, task="sequence_classification"), "model.task is 'sequence_classification'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(
    objective: Objective, model: ModelConfig, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        experiment(objective, model, DataConfig()).check()


def test_a_runs_file_may_name_any_objective(tmp_path: Path) -> None:
    from lmx import config
    from lmx.objectives.catalogue import OBJECTIVES

    for objective in OBJECTIVES:
        config.save(Experiment(objective=objective()), tmp_path / "experiment.json")
        assert config.load(Experiment, tmp_path / "experiment.json").objective == objective()
