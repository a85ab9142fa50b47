"""Likelihoods are those of model.logits computed plainly, one example at a time."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from evaluated import log_softmax

from lmx.data.config import DataConfig
from lmx.decode.loaded import Model
from lmx.errors import UserError
from lmx.eval.asking import TargetTooLong, asking, likelihoods
from lmx.eval.harness import Adapter
from lmx.eval.likelihood import Read, Scorer, bucket
from lmx.eval.sliding import sliding, windows
from lmx.eval.tasks.task import Examinee
from lmx.experiment import Experiment
from lmx.objectives.denoising import PrefixLm
from lmx.objectives.distillation import Distillation
from lmx.objectives.seq_to_seq import SeqToSeq

PAIRS = [
    ("the quick brown", " fox"),
    ("", "three small dogs"),
    ("the old ", "garden sings over the lazy dog while three sing"),
]


def found(model: Model, batch: int = 3) -> list[tuple[float, bool, int]]:
    way = asking(model)
    return [tuple(f) for f in likelihoods(Scorer(model, batch), way, [way.pair(*pair) for pair in PAIRS])]


def close(a: list[tuple[float, bool, int]], b: list[tuple[float, bool, int]]) -> None:
    np.testing.assert_allclose([x[0] for x in a], [x[0] for x in b], atol=2e-4)
    assert [x[1:] for x in a] == [x[1:] for x in b]


def ids(model: Model, text: str) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode(text)


def summed(scores: Any, targets: list[int]) -> tuple[float, bool, int]:
    """Of logits [targets, vocab]."""
    rows = np.arange(len(targets))
    found = log_softmax(scores)
    return found[rows, targets].sum(), bool((found.argmax(1) == targets).all()), len(targets)


def test_of_a_decoder(decoder: Model) -> None:
    plain = []
    for context, continuation in PAIRS:
        whole, start = ids(decoder, context + continuation), len(ids(decoder, context.rstrip()))
        scores = decoder.logits(np.array([[decoder.tokenizer.end_id, *whole[:-1]]]))[0]
        plain.append(summed(scores[start:], whole[start:]))
    close(found(decoder), plain)


def test_of_an_encoder_decoder(encoder_decoder: Model) -> None:
    model, plain = encoder_decoder, []
    for context, continuation in PAIRS:
        whole, start = ids(model, context + continuation), len(ids(model, context.rstrip()))
        source = np.array([[*whole[:start], model.tokenizer.end_id]])
        scores = model.logits(source, np.array([[0, *whole[start:-1]]]))[0]
        plain.append(summed(scores, whole[start:]))
    close(found(model), plain)


def test_of_an_encoder_each_token_is_masked_alone(encoder: Model) -> None:
    mask, plain = encoder.tokenizer.token_id("[MASK]"), []
    for context, continuation in PAIRS:
        whole, start = ids(encoder, context + continuation), len(ids(encoder, context.rstrip()))
        places = np.arange(start, len(whole))
        rows = np.repeat([[*whole, encoder.tokenizer.end_id]], len(places), axis=0)
        rows[np.arange(len(places)), places] = mask
        scores = np.asarray(encoder.logits(rows))[np.arange(len(places)), places]
        plain.append(summed(scores, whole[start:]))
    close(found(encoder), plain)


CONTEXT = "three hundred small birds"
PREFIXES = [PrefixLm(), SeqToSeq(), Distillation(objective=SeqToSeq())]


def with_prefix(decoder: Model, objective: Any) -> Model:
    """The decoder as one that learned such an objective."""
    tokenizer = decoder.tokenizer.with_end_token(before=not objective.ends_source)
    run = Experiment(model=decoder.config, objective=objective)
    return replace(decoder, tokenizer=tokenizer, experiment=run)


@pytest.mark.parametrize("objective", PREFIXES, ids=lambda o: type(o).__name__)
def test_of_a_decoder_with_a_prefix_is_that_of_what_it_generates(decoder: Model, objective: Any) -> None:
    model = with_prefix(decoder, objective)
    (done,) = model.generate([CONTEXT], max_new_tokens=4, temperature=0)
    way = asking(model)
    own = replace(way.pair(CONTEXT, " dog"), target=done.tokens)  # a random model's tokens are no text
    (score,) = likelihoods(Scorer(model), way, [own])
    assert score.logprob == pytest.approx(sum(done.logprobs), abs=1e-3)
    assert (score.greedy, score.tokens) == (True, 4)
    cut = way.pair("dog " * 200, " fox")
    (read,) = way.reads(cut)
    assert len(read.tokens) == read.prefix + len(cut.target) - 1 == way.room
    assert (read.tokens[read.prefix - 1] == model.tokenizer.end_id) == objective.ends_source


def test_a_target_is_tokenized_apart_from_its_source(decoder: Model) -> None:
    pair = asking(with_prefix(decoder, SeqToSeq())).pair("the qu", "ick fox")
    assert list(pair.target) == ids(decoder, "ick fox")
    assert list(pair.context) == ids(decoder, "the qu")


def test_a_prefix_has_no_likelihood_of_whole_texts(decoder: Model, encoder_decoder: Model) -> None:
    said = [(with_prefix(decoder, PrefixLm()), r"learned to go on with a prefix .*; score its own rows")]
    said += [(encoder_decoder, "this t5 does not predict the next token")]
    for model, words in said:
        with pytest.raises(UserError, match=words):
            sliding(Examinee(model), DataConfig())
        with pytest.raises(UserError, match=words):
            Adapter(model).loglikelihood_rolling([])


def test_do_not_depend_on_the_batch_or_the_mesh(decoder: Model, on_mesh: Model) -> None:
    expected = found(decoder, 1)
    close(found(decoder, 8), expected)
    close(found(on_mesh, 3), expected)


def test_a_row_that_is_asked_twice_is_run_once(decoder: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    plain = Scorer._read
    monkeypatch.setattr(Scorer, "_read", lambda self, rows: ran.extend(rows) or plain(self, rows))
    rows = [Read((0, 5, 6), (2,), (7,)), Read((0, 5, 6), (1, 2), (6, 7)), Read((0, 5, 6), (2,), (9,))]
    scores = Scorer(decoder).read(rows)
    assert len(ran) == 1
    assert scores[0].logprobs == scores[1].logprobs[1]
    assert scores[2].logprobs != scores[0].logprobs
    assert [len(own.best) for own in scores] == [1, 2, 1]


def test_what_is_too_long_loses_the_front_of_its_context(decoder: Model, encoder_decoder: Model) -> None:
    for model in (decoder, encoder_decoder):
        way, room = asking(model), model.spec.context
        pair = way.pair("dog " * 200, "fox")
        assert pair.cut > 0
        assert way.excess(pair) == 0
        (read,) = way.reads(pair)
        assert max(len(read.tokens), len(read.source)) == room
        with pytest.raises(TargetTooLong, match=f"exceed the model's context of {room}"):
            way.pair("the", " dog" * 200)


def test_a_continuation_without_tokens_is_refused(decoder: Model) -> None:
    with pytest.raises(UserError, match="'' has no tokens of its own"):
        asking(decoder).pair("the dog", "")


def test_models_that_cannot_be_asked_say_so(decoder: Model, classifier: Model) -> None:
    with pytest.raises(UserError, match="no head that predicts tokens"):
        asking(classifier)
    with pytest.raises(UserError, match="no tokenizer"):
        asking(replace(decoder, tokenizer=None))


def test_buckets_are_few() -> None:
    assert [bucket(n, 1000) for n in (1, 32, 33, 65, 500, 513, 1000)] == [32, 32, 64, 128, 512, 1000, 1000]


@pytest.mark.parametrize(("total", "length", "stride"), [(50, 16, 4), (10, 16, 8), (33, 16, 16), (17, 16, 1)])
def test_windows_predict_each_token_once_from_enough_before_it(total: int, length: int, stride: int) -> None:
    tokens = list(range(1000, 1000 + total))
    predicted = []
    for read in windows(tokens, length, stride):
        assert len(read.tokens) <= length
        for at, target in zip(read.at, read.targets, strict=True):
            assert read.tokens[at] == target - 1  # the token right before it
            assert at + 1 >= min(length - stride, target - 1000)
            predicted.append(target)
    assert predicted == tokens[1:]
