"""Losses against float64 references on whole logits; no document's loss moves when another one changes."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.data.layout import Piece
from lmx.errors import UserError
from lmx.experiment import Experiment, TrainConfig
from lmx.models.config import ModelConfig
from lmx.models.families.bert import Bert
from lmx.models.families.deepseek_v3 import DeepseekV3
from lmx.models.families.gemma2 import Gemma2
from lmx.models.families.gpt2 import Gpt2
from lmx.models.families.llama import Llama
from lmx.models.families.t5 import T5
from lmx.models.model import Inputs
from lmx.models.schedules import PipelineConfig
from lmx.nn.router import SigmoidRouter
from lmx.objectives.chat import ChatSft
from lmx.objectives.denoising import Denoisers, PrefixLm, SpanCorruption
from lmx.objectives.distillation import Distillation
from lmx.objectives.fill_in_the_middle import FillInTheMiddle
from lmx.objectives.masked_lm import MaskedLm, Nsp
from lmx.objectives.next_token import NextToken
from lmx.objectives.objective import Frozen, Objective
from lmx.objectives.random_rows import random_layout, random_rows
from lmx.objectives.seq_to_seq import SeqToSeq
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Sharding, use_sharding
from lmx.train.step import BATCH, gradients
from tests.jitted import apply, encode, init_params, logits

VOCAB, LENGTH = 150, 48
BERT = Bert(vocab=VOCAB, context=LENGTH, layers=1, width=16, heads=2, hidden=32, task="pretraining")
ONE = MeshConfig(data=1)
PAIRS = replace(BERT, layers=2)
SIZES: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "heads": 2, "head_dim": 8, "hidden": 32}
ENCODER_DECODER = T5(vocab=VOCAB, context=LENGTH, width=16, **SIZES)
GPT2 = Gpt2(vocab=VOCAB, context=LENGTH, layers=1, width=16, heads=2)
LLAMA = Llama(vocab=VOCAB, context=LENGTH, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, hidden=32)
DEEPSEEK = DeepseekV3(
    vocab=VOCAB,
    context=LENGTH,
    layers=2,
    dense_layers=1,
    width=16,
    heads=2,
    hidden=32,
    q_lora=None,
    kv_lora=8,
    nope_dim=8,
    rope_dim=4,
    value_dim=8,
    experts=4,
    expert_hidden=8,
    router=SigmoidRouter(k=2),
)
CASES = [
    (MaskedLm(), BERT),
    (SpanCorruption(sentinels=20), ENCODER_DECODER),
    (SpanCorruption(sentinels=20), LLAMA),
    (PrefixLm(), ENCODER_DECODER),
    (PrefixLm(), GPT2),
    (SeqToSeq(), ENCODER_DECODER),
    (SeqToSeq(), LLAMA),
    (FillInTheMiddle(), LLAMA),
    (NextToken(), GPT2),
]
IDS = [f"{type(o).__name__}-{m.family}" for o, m in CASES]


def arrays(rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {key: jnp.asarray(value) for key, value in rows.items()}


def reference(
    objective: Objective, model: ModelConfig, params: Any, rows: dict[str, np.ndarray]
) -> dict[tuple[int, int], float]:
    """The summed negative log-likelihood by row and segment, in float64, each document read on its own."""
    spec, sums = model.spec(), dict[tuple[int, int], float]()
    marked = rows.get("target_segments", rows["segment_ids"])
    for i, j in zip(*np.nonzero(marked), strict=True):
        segment = int(marked[i, j])
        if (i, segment) not in sums:
            sums[i, segment] = alone(spec, params, {k: v[i] for k, v in rows.items()}, segment)
    return sums


def alone(spec: Any, params: Any, row: dict[str, np.ndarray], segment: int) -> float:
    """One document without its neighbours, at the start of a row."""
    mine = row["segment_ids"] == segment
    inputs = at_start(row["tokens"][mine])
    answers = row["targets"][row.get("target_segments", row["segment_ids"]) == segment]
    if "decoder_tokens" in row:
        memory, _ = encode(spec, params, inputs)
        out = apply(spec, params, at_start(row["decoder_tokens"][row["target_segments"] == segment]), memory=memory)
        at = np.arange(len(answers))
    elif "slots" in row:
        out = apply(spec, params, inputs)
        at = row["slots"][row["target_segments"] == segment] - np.flatnonzero(mine)[0]
    else:
        prefix = at_start(row["prefix"][mine] > 0).tokens if "prefix" in row else None
        out = apply(spec, params, replace(inputs, prefix=prefix))
        at = np.flatnonzero(row.get("target_segments", row["segment_ids"])[mine])
    scores = np.asarray(logits(spec, params, out.hidden), np.float64)[0, at, :VOCAB]
    top = scores.max(-1)
    nll = np.log(np.exp(scores - top[:, None]).sum(-1)) + top - scores[np.arange(len(at)), answers]
    return float(nll.sum())


def at_start(tokens: np.ndarray) -> Inputs:
    """A row of them alone, padded to the one length for which the model is compiled."""
    padded = np.zeros((1, LENGTH), tokens.dtype)
    padded[0, : len(tokens)] = tokens
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    return Inputs(*map(jnp.asarray, (padded, positions, (positions < len(tokens)).astype(np.int32))))


@pytest.mark.parametrize(("objective", "model"), CASES, ids=IDS)
def test_the_loss_is_that_of_each_document_read_alone(objective: Objective, model: ModelConfig) -> None:
    spec = model.spec()
    params = init_params(spec, jax.random.key(0))
    rows = random_rows(objective, spec, 2, LENGTH, (3,))
    sums = jax.jit(lambda p, b: objective.loss(spec, p, b))(params, arrays(rows))
    expected = reference(objective, model, params, rows)
    assert len(expected) > 2
    assert float(sums.nll) == pytest.approx(sum(expected.values()), rel=1e-5)
    assert float(sums.weight) == (rows.get("target_segments", rows["segment_ids"]) > 0).sum()


MORE = [
    (Nsp(), BERT),
    (Denoisers(sentinels=20), ENCODER_DECODER),
    (ChatSft(), LLAMA),
    (Distillation(states=1.0), LLAMA),
]


@pytest.mark.parametrize(
    ("objective", "model"), CASES + MORE, ids=[*IDS, *(f"{type(o).__name__}-{m.family}" for o, m in MORE)]
)
def test_no_document_leaks_into_another(objective: Objective, model: ModelConfig) -> None:
    """What the first document of a row adds to its loss is the same whatever the second one says."""
    spec = model.spec()
    # Larger than they start, so that what is seen matters.
    params = jax.tree.map(lambda a: np.float32(5) * np.asarray(a), init_params(spec, jax.random.key(1)))
    teacher = replace(model, width=32).spec()
    frozen = {name: Frozen(teacher, init_params(teacher, jax.random.key(2))) for name in objective.models}
    layout = random_layout(objective, spec, LENGTH)
    loss = jax.jit(objective.loss_with(frozen), static_argnums=0)
    rng = np.random.default_rng(0)
    one, two, other = (rng.integers(60, VOCAB, 12, np.int32) for _ in range(3))

    shares = []
    for second in (two, other):
        labels = np.ones(12, np.int32)
        pieces = [Piece(text, i, target=text[:5], labels=labels) for i, text in enumerate((one, second))]
        row = layout.row(pieces, np.random.default_rng(3), lambda _: None)
        assert (row.get("target_segments", row["segment_ids"]) == 2).any()
        both, left = (loss(spec, params, arrays({k: v[None] for k, v in r.items()})) for r in (row, without_first(row)))
        shares.append(float(both.total - left.total))
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    assert shares[0] > 1


def without_first(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The row with nothing but padding in its first document's places."""
    segments = {key: row[key] for key in ("segment_ids", "target_segments") if key in row}
    answers = {"answers": row["answers"] * (np.arange(len(row["answers"])) > 0)} if "answers" in row else {}
    return row | answers | {key: np.where(of == 1, 0, of) for key, of in segments.items()}


def test_the_next_sentence_question_is_cross_entropy_over_the_pairs() -> None:
    spec = BERT.spec()
    objective, params = Nsp(), init_params(spec, jax.random.key(0))
    rows = random_rows(objective, spec, 2, LENGTH, (1,))
    sums = jax.jit(objective.loss, static_argnums=0)(spec, params, arrays(rows))
    inputs = Inputs(*(jnp.asarray(rows[k]) for k in ("tokens", "positions", "segment_ids", "types")))
    hidden = np.asarray(apply(spec, params, inputs).hidden, np.float64)
    head = jax.tree.map(lambda a: np.asarray(a, np.float64), params["tasks"]["nsp"])
    nll, count = 0.0, 0
    for i, j in zip(*np.nonzero(rows["answers"]), strict=True):
        state = hidden[i, rows["pair_slots"][i, j]]
        state = np.tanh(state @ head["transform"]["dense"]["kernel"] + head["transform"]["dense"]["bias"])
        scores = state @ head["out"]["kernel"] + head["out"]["bias"]
        nll += np.log(np.exp(scores).sum()) - scores[rows["answers"][i, j] - 1]
        count += 1
    assert count > 1
    assert float(sums.aux["pairs"]["weight"]) == count
    assert float(sums.aux["pairs"]["nll"]) == pytest.approx(nll, rel=1e-5)
    assert float(sums.total - sums.nll) / float(sums.weight) == pytest.approx(nll / count, rel=1e-4)


@pytest.fixture(scope="module")
def pairs_at_once() -> tuple[Any, Any, Any]:
    """Parameters, rows with different numbers of pairs, and the gradients of the whole batch."""
    params = init_params(PAIRS.spec(), jax.random.key(0))
    rows = arrays(random_rows(Nsp(), PAIRS.spec(), 8, LENGTH, (3,)))
    counts = (rows["answers"] > 0).sum(1)
    assert len(set(counts.tolist())) > 1
    return params, rows, pair_gradients(params, rows)


def pair_gradients(params: Any, rows: Any, mesh: MeshConfig = ONE, accumulate: int = 1) -> Any:
    train = TrainConfig(batch=8, length=LENGTH, accumulate=accumulate, remat="none")
    experiment = Experiment(model=PAIRS, objective=Nsp(), train=train, pipeline=PipelineConfig("1f1b", 2))
    devices = jax.devices()[: mesh.data * mesh.stage]
    sharding = Sharding(build_mesh(mesh, devices), experiment.rules)
    with use_sharding(sharding):
        placed = jax.device_put(rows, sharding.named(BATCH))
        return jax.device_get(jax.jit(lambda p, b: gradients(experiment, p, b, None)[0])(params, placed))


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [(ONE, 2), (ONE, 4), (MeshConfig(data=2, stage=2), 1)],
    ids=["2 microbatches", "4 microbatches", "a pipeline"],
)
def test_the_question_about_pairs_is_a_mean_over_the_whole_batch(
    mesh: MeshConfig, accumulate: int, pairs_at_once: tuple[Any, Any, Any]
) -> None:
    params, rows, whole = pairs_at_once
    for ours, one in zip(*map(jax.tree.leaves, (pair_gradients(params, rows, mesh, accumulate), whole)), strict=True):
        np.testing.assert_allclose(ours, one, atol=1e-5 * max(float(np.abs(one).max()), 1.0), rtol=0)


@pytest.mark.parametrize("model", [LLAMA, DEEPSEEK], ids=["keys of all heads", "a latent"])
def test_a_prefix_is_read_in_both_directions_and_the_rest_is_not(model: Any) -> None:
    spec = model.spec()
    params = init_params(spec, jax.random.key(0))
    tokens = jnp.arange(10, dtype=jnp.int32)[None] + 20
    whole = Inputs.whole(tokens)
    prefix = jnp.arange(10)[None] < 4

    def hidden(changed: int) -> np.ndarray:
        other = tokens.at[0, changed].set(99)
        inputs = Inputs(other, whole.positions, whole.segments, prefix=prefix)
        return np.asarray(apply(spec, params, inputs).hidden[0])

    inputs = Inputs(tokens, whole.positions, whole.segments, prefix=prefix)
    base = np.asarray(apply(spec, params, inputs).hidden[0])
    moved = [np.abs(hidden(i) - base).max(-1) > 1e-7 for i in (3, 6)]
    assert moved[0].tolist() == [True] * 10
    assert moved[1].tolist() == [False] * 6 + [True] * 4


def test_a_prefix_that_a_window_cannot_see_is_refused() -> None:
    gemma = Gemma2(vocab=384, context=64, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, hidden=32, window=4)
    with pytest.raises(UserError, match="PrefixLm lets a prefix see all of itself, which the SlidingWindow"):
        PrefixLm().check(gemma, 64)
    whole = Inputs.whole(jnp.ones((1, 6), jnp.int32))
    params = init_params(gemma.spec(), jax.random.key(0))
    with pytest.raises(UserError, match="a prefix needs layers that see all before them"):
        apply(gemma.spec(), params, replace(whole, prefix=whole.positions < 2))
