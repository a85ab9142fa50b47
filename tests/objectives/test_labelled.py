"""Losses of labelled examples against float64 references of each example alone; what rows hold; what is refused."""

import functools
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.data.framing import Frames
from lmx.data.layout import Piece
from lmx.errors import UserError
from lmx.models.config import ModelConfig
from lmx.models.families.bart import Bart
from lmx.models.families.bert import Bert
from lmx.models.families.llama import Llama
from lmx.models.families.modernbert import ModernBert
from lmx.models.families.t5 import T5
from lmx.models.model import Inputs
from lmx.objectives.chat import ChatRows, ChatSft
from lmx.objectives.classification import Classification, MultiLabel, Regression
from lmx.objectives.labelled import Labelled, segment_states
from lmx.objectives.objective import Objective
from lmx.objectives.random_rows import random_layout, random_rows
from lmx.objectives.span_answers import AnswerRows, ExtractiveQa, span_f1
from lmx.objectives.token_classification import TokenClassification
from tests.jitted import apply, encode, init_params, task

VOCAB, LENGTH, CLASSES = 150, 64, 3
COMMON: dict[str, Any] = {"vocab": VOCAB, "context": LENGTH, "classes": CLASSES}
BERT = Bert(layers=1, width=16, heads=2, hidden=32, **COMMON)
LLAMA = Llama(layers=1, width=16, heads=2, kv_heads=1, head_dim=8, hidden=32, **COMMON)
STACKS: dict[str, Any] = {f"{stack}_heads": 2 for stack in ("encoder", "decoder")}
STACKS |= {f"{stack}_{name}": n for stack in ("encoder", "decoder") for name, n in (("layers", 1), ("hidden", 32))}
BART = Bart(width=16, **STACKS, **COMMON)
MODERN = ModernBert(layers=1, width=16, heads=2, hidden=32, pooling="mean", **COMMON)
CASES: list[tuple[Labelled, ModelConfig]] = [
    (Classification(), BERT),
    (Classification(), BART),
    (Classification(), MODERN),
    (MultiLabel(), LLAMA),
    (Regression(), BERT),
    (TokenClassification(), LLAMA),
    (ExtractiveQa(overlap=8), BERT),
]
IDS = [f"{type(o).__name__}-{m.family}" for o, m in CASES]


def arrays(rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {key: jnp.asarray(value) for key, value in rows.items()}


@functools.cache
def compiled(spec: Any) -> Any:
    """(params, a row's inputs, its decoder's or None) -> the head's scores of the row."""

    def scores(params: Any, inputs: Inputs, decoder: Inputs | None) -> jax.Array:
        memory = None if decoder is None else encode(spec, params, inputs)[0]
        read = inputs if decoder is None else decoder
        hidden = apply(spec, params, read, memory=memory).hidden
        return task(spec, params, spec.tasks[0].name, hidden, read)[0]

    return jax.jit(scores)


@functools.cache
def measure(objective: Labelled, spec: Any) -> Any:
    return jax.jit(lambda p, b: objective.measured({}, spec, p, b))


def alone(objective: Labelled, spec: Any, params: Any, row: dict[str, np.ndarray], segment: int) -> tuple[float, int]:
    """The summed loss of one example read without its neighbours, in float64, and how many targets it has."""
    mine = np.flatnonzero(row["segment_ids"] == segment)
    names = ("tokens", "positions", "segment_ids", "types", "decoder_tokens")
    one = {name: np.zeros((1, LENGTH), np.int32) for name in names if name in row}
    for name, array in one.items():
        array[0, : len(mine)] = row[name][mine]
    inputs = Inputs(one["tokens"], one["positions"], one["segment_ids"], one.get("types"))
    decoder = replace(inputs, tokens=one["decoder_tokens"], types=None) if spec.encoder else None
    scores = np.asarray(compiled(spec)(params, inputs, decoder), np.float64)
    scores = scores[: len(mine)] if scores.ndim > 1 else scores
    return float(reference(objective, scores, row, segment, mine)), targets(objective, row, mine)


def targets(objective: Labelled, row: dict[str, np.ndarray], mine: np.ndarray) -> int:
    return int((row["labels"][mine] > 0).sum()) if isinstance(objective, TokenClassification) else 1


def cross_entropy(scores: np.ndarray, label: int) -> float:
    return float(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[label])


def reference(
    objective: Labelled, scores: np.ndarray, row: dict[str, np.ndarray], segment: int, mine: np.ndarray
) -> float:
    if isinstance(objective, TokenClassification):
        labels = row["labels"][mine]
        return sum(cross_entropy(s, label - 1) for s, label in zip(scores, labels, strict=True) if label)
    if isinstance(objective, ExtractiveQa):
        ends = [row[name][segment - 1] - 1 - mine[0] for name in ("starts", "ends")]
        return sum(cross_entropy(scores[:, i], end) for i, end in enumerate(ends)) / 2
    if isinstance(objective, Regression):
        return float(np.square(scores - row["numbers"].reshape(-1, CLASSES)[segment - 1]).mean())
    if isinstance(objective, MultiLabel):
        holds = row["labels"].reshape(-1, CLASSES)[segment - 1] == 2
        chance = 1 / (1 + np.exp(-scores))
        return float(-np.log(np.where(holds, chance, 1 - chance)).mean())
    return cross_entropy(scores, row["labels"][segment - 1] - 1)


def shaped(objective: Labelled, model: ModelConfig) -> Any:
    model = replace(model, task=objective.task)
    objective.check(model, LENGTH)
    return model.spec()


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def case(request: pytest.FixtureRequest) -> tuple[Labelled, Any, Any]:
    objective, model = request.param
    spec = shaped(objective, model)
    return objective, spec, jax.jit(functools.partial(init_params, spec))(jax.random.key(0))


def test_the_loss_is_that_of_each_example_read_alone(case: tuple[Labelled, Any, Any]) -> None:
    objective, spec, params = case
    rows = random_rows(objective, spec, 2, LENGTH, (3,))
    sums, measures = measure(objective, spec)(params, arrays(rows))
    each = [{name: array[i] for name, array in rows.items()} for i in range(2)]
    found = [alone(objective, spec, params, r, s) for r in each for s in range(1, r["segment_ids"].max() + 1)]
    assert len(found) > 2
    assert float(sums.total) == pytest.approx(sum(loss for loss, _ in found), rel=1e-5)
    assert float(sums.weight) == pytest.approx(sum(count for _, count in found))
    if "cases" in measures:
        assert float(measures["hits"].sum()) <= float(measures["cases"].sum())


def test_no_example_leaks_into_another(case: tuple[Labelled, Any, Any]) -> None:
    """What is left of a row's loss without its second example's is the same whatever that example says."""
    objective, spec, params = case
    layout, rng = random_layout(objective, spec, LENGTH), np.random.default_rng(0)
    one, two, other = (rng.integers(60, VOCAB, 12, np.int32) for _ in range(3))
    labels = layout.invented_labels(rng, 12)
    second = np.zeros(0, np.int32) if isinstance(objective, TokenClassification) else one[:5]
    losses = []
    for text in (two, other):
        pieces = [Piece(t, i, target=second, labels=labels) for i, t in enumerate((one, text))]
        row, empty = layout.row(pieces, rng, lambda _: None), layout.empty()
        whole, _ = measure(objective, spec)(params, arrays({k: np.stack([row[k], empty[k]]) for k in row}))
        losses.append(float(whole.total) - alone(objective, spec, params, row, 2)[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] > 0


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_segments_are_pooled_as_rows_of_their_own_would_be(pool: Any) -> None:
    rng = np.random.default_rng(0)
    hidden, segments = rng.standard_normal((2, 20, 4)), np.zeros((2, 20), np.int32)
    for i, cuts in enumerate(([0, 3, 4, 11], [0, 9, 20])):
        for s, (a, b) in enumerate(pairwise(cuts), start=1):
            segments[i, a:b] = s
    found = np.asarray(segment_states(pool, jnp.asarray(hidden), jnp.asarray(segments), 8))
    for i, s in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 2)):
        own = hidden[i][segments[i] == s]
        expected = {"first": own[0], "last": own[-1], "mean": own.mean(0)}[pool]
        np.testing.assert_allclose(found[i, s - 1], expected, rtol=1e-5)


def test_spans_have_the_f1_of_their_tokens() -> None:
    rng = np.random.default_rng(0)
    guess, right = rng.integers(0, 6, (50, 2)), np.sort(rng.integers(0, 6, (50, 2)))
    for g, r, found in zip(guess, right, np.asarray(span_f1(jnp.asarray(guess), jnp.asarray(right))), strict=True):
        ours, theirs = set(range(g[0], g[1] + 1)), set(range(r[0], r[1] + 1))
        assert found == pytest.approx(2 * len(ours & theirs) / (len(ours) + len(theirs)))


def test_an_answer_outside_of_its_window_points_at_the_first_token() -> None:
    layout = AnswerRows(40, Frames.plain(0), False, None, 2, "split", 4)
    context, question = np.arange(100, 130, dtype=np.int32), np.array([7, 8], np.int32)
    answer = np.array([12, 14], np.int32)

    def row(start: int, count: int) -> dict[str, np.ndarray]:
        piece = Piece(context[start : start + count], target=question, labels=answer, start=start)
        return layout.row([piece], np.random.default_rng(0), lambda _: None)

    whole = row(10, 10)
    assert whole["tokens"][:5].tolist() == [0, 7, 8, 0, 110]
    assert whole["tokens"][whole["starts"][0] - 1 : whole["ends"][0]].tolist() == [112, 113, 114]
    for start, count in ((0, 14), (13, 10), (20, 10)):
        assert row(start, count)["starts"][0] == row(start, count)["ends"][0] == 1


def test_chats_learn_the_chosen_turns() -> None:
    piece = Piece(np.arange(50, 60, dtype=np.int32), labels=np.array([0, 0, 1, 1, 0, 0, 2, 2, 2, 0], np.int32))
    for turns, learned in (("all", [52, 53, 56, 57, 58]), ("last", [56, 57, 58])):
        row = ChatRows(24, turns, "drop").row([piece, piece], np.random.default_rng(0), lambda _: None)  # type: ignore[arg-type]
        for segment in (1, 2):
            assert row["targets"][row["target_segments"] == segment].tolist() == learned
            assert row["tokens"][row["segment_ids"] == segment].tolist() == list(range(50, 59))
    assert ChatRows(6, "last", "truncate").row([piece], np.random.default_rng(0), lambda _: None)["targets"][5] == 56


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        (Classification(), BERT, "needs a model with a head for it, but model.task is 'token_prediction'"),
        (Classification(), replace(BERT, task="token_classification"), "set it to 'sequence_classification'"),
        (ExtractiveQa(), T5(context=64, task="question_answering"), "which a t5 does not have"),
        (ExtractiveQa(overlap=64), replace(BERT, task="question_answering"), "objective.overlap is 64"),
        (ChatSft(), BERT, "but a bert sees the whole text"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(objective: Objective, model: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        objective.check(model, LENGTH)
