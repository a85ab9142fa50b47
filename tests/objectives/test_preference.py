"""Preference optimisation from files to a model that prefers what people chose."""

import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.data.builders.base import Span
from lmx.data.builders.stdlib_preferences import StdlibPreferences as Builder
from lmx.data.config import DataConfig, Preferences, PreferredChats, StdlibPreferences, TrainedBpe
from lmx.data.layout import Piece
from lmx.data.prepare import prepare
from lmx.data.rows import held_out_rows
from lmx.errors import UserError
from lmx.experiment import EvalConfig, Experiment, TrainConfig
from lmx.models.families.llama import Llama
from lmx.models.families.t5 import T5
from lmx.models.model import Inputs
from lmx.objectives.objective import Frozen
from lmx.objectives.preference import Dpo, Preference, PreferenceRows, SimPo
from lmx.optim.schedule import Schedule
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding, use_sharding
from lmx.train import run as run_module
from lmx.train.run import train
from lmx.train.state import init_state, state_shardings
from lmx.train.step import BATCH, gradients
from tests.jitted import apply, init_params, logits

MODEL = Llama(vocab=300, context=64, layers=1, width=16, heads=2, kv_heads=2, head_dim=8, hidden=32)
LENGTH = 48


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    rows = [{"prompt": f"{i}:", "chosen": " yes", "rejected": " no, no"} for i in range(60)]
    file = written(tmp_path_factory.mktemp("preferences") / "pairs.jsonl", rows)
    return DataConfig((Preferences(files=(file,)),), TrainedBpe(300), held_out=0.2)


def random_pieces(seed: int, count: int, longest: int) -> list[Piece]:
    rng, pieces = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, chosen, rejected = (rng.integers(1, 300, rng.integers(1, longest + 1), np.int32) for _ in range(3))
        both = np.concatenate([chosen, rejected])
        pieces.append(Piece(prompt, target=both, labels=np.array([len(chosen)], np.int32)))
    return pieces


def batch_of(pieces: list[Piece]) -> dict[str, jax.Array]:
    row = PreferenceRows(LENGTH).row(pieces, np.random.default_rng(0), lambda rng: None)
    return {name: jnp.asarray(array)[None] for name, array in row.items()}


def test_the_loss_is_that_of_each_completion_read_alone() -> None:
    spec = MODEL.spec()
    own, other = (init_params(spec, jax.random.key(seed)) for seed in (0, 1))
    pieces = random_pieces(0, 3, 5)
    expected, right = 0.0, 0

    def alone(params: Any, prompt: np.ndarray, completion: np.ndarray) -> float:
        stream = np.concatenate([prompt, completion])
        read = np.zeros((1, LENGTH), np.int32)  # of one length, for which the model is compiled
        read[0, : len(stream) - 1] = stream[:-1]
        out = apply(spec, params, Inputs.whole(jnp.asarray(read)))
        scores = np.asarray(logits(spec, params, out.hidden)[0, :, :300], np.float64)
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        return float(sum(scores[len(prompt) - 1 + i, token] for i, token in enumerate(completion)))

    for piece in pieces:
        completions = np.split(piece.target, [int(piece.labels[0])])
        gains = [alone(own, piece.tokens, c) - alone(other, piece.tokens, c) for c in completions]
        expected += -np.log(1 / (1 + np.exp(-0.5 * (gains[0] - gains[1]))))
        right += gains[0] > gains[1]
    objective = Preference(Dpo(beta=0.5))
    loss = jax.jit(lambda p, q, batch: objective.loss_with({"reference": Frozen(spec, q)})(spec, p, batch))
    sums = loss(own, other, batch_of(pieces))
    np.testing.assert_allclose(sums.total, expected, rtol=1e-4)
    assert (float(sums.weight), float(sums.correct)) == (3, right)


def test_no_pair_leaks_into_another() -> None:
    spec, params = MODEL.spec(), init_params(MODEL.spec(), jax.random.key(0))
    one, two, three = random_pieces(1, 3, 5)
    loss = jax.jit(Preference(SimPo()).loss, static_argnums=0)
    lone, with_two, with_three = (
        loss(spec, params, batch_of(pieces)).total for pieces in ([one], [one, two], [one, three])
    )
    apart = [loss(spec, params, batch_of([piece])).total for piece in (two, three)]
    np.testing.assert_allclose(with_two - apart[0], lone, rtol=1e-4)
    np.testing.assert_allclose(with_three - apart[1], lone, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(3, 4, 5), (60, 4, 5), (60, 40, 5), (1, 40, 50), (60, 1, 60)])
def test_a_pair_that_is_too_long_keeps_its_completions_first(sizes: tuple[int, int, int]) -> None:
    prompt, chosen, rejected = (np.arange(1, n + 1, dtype=np.int32) + 100 * i for i, n in enumerate(sizes))
    piece = Piece(prompt, target=np.concatenate([chosen, rejected]), labels=np.array([len(chosen)], np.int32))
    row = PreferenceRows(LENGTH).row([piece], np.random.default_rng(0), lambda rng: None)
    room = LENGTH + 2 - len(chosen) - len(rejected)
    for segment, completion in ((1, chosen), (2, rejected)):
        targets = row["targets"][row["target_segments"] == segment]
        np.testing.assert_array_equal(targets, completion[: len(targets)])
        assert len(targets) == len(completion) or room < 2
        tokens = row["tokens"][row["segment_ids"] == segment]
        kept = tokens[: len(tokens) - len(targets) + 1]
        np.testing.assert_array_equal(kept, prompt[-len(kept) :])


def test_training_learns_what_was_chosen(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_report", lambda run: {})
    base = Experiment(
        model=MODEL,
        data=data,
        objective=Preference(SimPo()),
        schedule=Schedule(peak=1e-2, warmup=0),
        train=TrainConfig(steps=1, batch=8, length=LENGTH, remat="none"),
        eval=EvalConfig(),
    )
    train(base, tmp_path / "start")
    steps = replace(base.train, steps=12)
    referred = replace(base, train=steps, objective=Preference(Dpo(0.5)), init_from=str(tmp_path / "start"))
    summary = train(referred, tmp_path / "run")
    assert summary["eval_accuracy"] == 1
    assert summary["eval_baseline_accuracy"] == 0.5
    assert summary.get("eval_perplexity") is summary.get("eval_bits_per_byte") is None  # of pairs, not of text
    assert summary["eval_loss"] < 0.3 < np.log(2)
    with pytest.raises(UserError, match="names no model, and init_from none"):
        train(replace(referred, init_from=""), tmp_path / "other")


def test_eight_devices_equal_one() -> None:
    experiment = Experiment(model=MODEL, objective=Preference(Dpo(0.5)), train=TrainConfig(batch=8, length=LENGTH))
    spec = MODEL.spec()
    start = jax.device_get(jax.jit(lambda key: init_state(experiment, key))(jax.random.key(0)))
    frozen = {"reference": Frozen(spec, jax.device_get(init_params(spec, jax.random.key(1))))}
    rows = [batch_of(random_pieces(i, 1 + i % 3, 4)) for i in range(8)]
    batch = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def gradient(mesh: MeshConfig, count: int) -> Any:
        sharding = Sharding(build_mesh(mesh, jax.devices()[:count]), Rules())
        state = replace(start, frozen=frozen)
        state = jax.device_put(state, state_shardings(experiment, sharding, frozen), may_alias=False)
        placed = jax.device_put(batch, sharding.named(BATCH))
        with use_sharding(sharding):
            found = jax.jit(lambda s, b: gradients(experiment, s.params, b, None, s.frozen))(state, placed)
        return jax.device_get(found)

    (one, sums), (eight, same) = gradient(MeshConfig(data=1), 1), gradient(MeshConfig(data=2, sequence=2, tensor=2), 8)
    assert sums.weight == same.weight == 15
    np.testing.assert_allclose(same.total, sums.total, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(float(np.abs(a).max()), 1.0))


def test_chats_are_compared_from_where_they_part(tmp_path: Path) -> None:
    user, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "well"), ("assistant", "no"))
    )
    rows = [{"prompt": "hi", "chosen": "well", "rejected": "no"}, {"chosen": [user, good], "rejected": [user, bad]}]
    found = []
    for index, row in enumerate(rows):
        file = written(tmp_path / f"{index}.jsonl", [row])
        column = "prompt" if index == 0 else ""
        source = PreferredChats(files=(file,), template="chatml", messages_column=column)
        specials = source.special_tokens
        prepared = prepare(
            DataConfig((source,), TrainedBpe(300, special_tokens=specials), held_out=1.0), progress=False
        )
        found.append(held_out_rows(prepared, length=PreferenceRows(LENGTH))[0])
    row, text = found[1], prepared.tokenizer.decode
    for name, array in found[0].items():
        np.testing.assert_array_equal(array, row[name])
    for segment, answer in ((1, "well"), (2, "no")):
        assert answer in text(row["targets"][row["target_segments"] == segment].tolist())
        assert "hi" in text(row["tokens"][row["segment_ids"] == segment].tolist())


def test_what_does_not_fit_is_one_sentence(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a t5 has an encoder"):
        Preference().check(T5(vocab=300, context=64, encoder_layers=1, decoder_layers=1), 48)
    with pytest.raises(UserError, match="compares with a reference"):
        Preference().loss_with({})
    same = written(tmp_path / "same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(UserError, match="it is the same as chosen"):
        prepare(replace(data, sources=(Preferences(files=(same,)),)), progress=False)
    lacks = written(tmp_path / "lacks.jsonl", [{"prompt": "a", "good": "b", "rejected": "b"}])
    with pytest.raises(UserError, match="no column 'chosen'"):
        prepare(replace(data, sources=(Preferences(files=(lacks,)),)), progress=False)


def test_the_librarys_code_is_preferred_in_its_own_order() -> None:
    path = Path(textwrap.__file__)
    found = [r for r in Builder.records(StdlibPreferences(), Span(str(path), path.stat().st_size)) if r is not None]
    examples = {record["path"]: json.loads(record["example"]) for record in found}
    own = examples["textwrap.py:dedent"]
    assert own["prompt"] == "# Remove any common leading whitespace from every line in `text`.\n"
    assert own["chosen"].startswith("def dedent(text):")
    assert "Remove any common leading whitespace" not in own["chosen"]
    chosen, rejected = (own[name].split("\n") for name in ("chosen", "rejected"))
    assert rejected[0] == chosen[0]
    assert sorted(rejected) == sorted(chosen)
    assert rejected != chosen
    assert all(record["text"] == json.loads(record["example"])["prompt"] for record in found)
