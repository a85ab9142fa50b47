"""Students learn from teachers: every objective of tokens, any mesh, runs that go on exactly."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx.checkpoint.checkpointer import load_subtree
from lmx.checkpoint.config import CheckpointConfig
from lmx.data.config import DataConfig
from lmx.data.prepare import prepare
from lmx.decode.frozen import load_frozen
from lmx.errors import Interrupted, UserError
from lmx.eval.perplexity import evaluate
from lmx.experiment import EvalConfig, Experiment, RunDir, TrainConfig
from lmx.models.families.bert import Bert
from lmx.models.families.llama import Llama
from lmx.models.families.t5 import T5
from lmx.models.schedules import PipelineConfig
from lmx.objectives.class_distillation import ClassDistillation
from lmx.objectives.classification import Classification
from lmx.objectives.denoising import PrefixLm
from lmx.objectives.distillation import Distillation, states_apart
from lmx.objectives.masked_lm import MaskedLm
from lmx.objectives.objective import Frozen
from lmx.objectives.random_rows import random_rows
from lmx.objectives.seq_to_seq import SeqToSeq
from lmx.optim.catalogue import Sgd
from lmx.optim.schedule import Schedule
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding
from lmx.train import run as run_module
from lmx.train.run import train
from lmx.train.signals import StopSignal
from lmx.train.state import init_state, state_shardings
from lmx.train.step import BATCH, jit_step
from tests.jitted import init_params

SIZES: dict[str, Any] = {"layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "hidden": 32}
STUDENT = Llama(vocab=320, context=64, width=16, **SIZES)
TEACHER = replace(STUDENT, width=32, layers=2)
STEPS = 6


@pytest.fixture(scope="module")
def base(documents: DataConfig) -> Experiment:
    return Experiment(
        model=TEACHER,
        data=documents,
        schedule=Schedule(peak=1e-2, warmup=1),
        train=TrainConfig(steps=STEPS, batch=8, length=32, log_every=1, remat="none"),
        eval=EvalConfig(rows=4),
        checkpoint=CheckpointConfig(every=3),
    )


@pytest.fixture(scope="module")
def teacher(base: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "teacher"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_report", lambda run: {})
        train(base, path)
    return path


@pytest.fixture
def student(base: Experiment, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr(run_module, "_report", lambda run: {})
    return replace(base, model=STUDENT, objective=Distillation(teacher=str(teacher), states=0.1))


def metrics(path: Path) -> list[dict[str, Any]]:
    kept = ("loss", "nll", "teacher_kl", "states_apart", "grad_norm")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in kept} for line in lines]


def test_a_student_goes_on_exactly_and_is_evaluated_without_its_teacher(
    student: Experiment, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "teacher"
    shutil.copytree(teacher, own)
    student = replace(student, objective=replace(student.objective, teacher=str(own)))
    train(student, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "asks", lambda self, done: done == 3)
        with pytest.raises(Interrupted):
            train(student, tmp_path / "parts")
    train(student, tmp_path / "parts")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert set(load_subtree(RunDir(tmp_path / "parts").checkpoints, "params").state) == {
        "embedding",
        "stack",
        "final_norm",
        "head",
    }
    with pytest.raises(UserError, match="no part 'frozen'"):
        load_subtree(RunDir(tmp_path / "parts").checkpoints, "frozen")
    shutil.rmtree(own)
    model = lmx.load(tmp_path / "parts")
    assert evaluate(model, student.corpus).loss < 8


CASES: list[Any] = [
    (MaskedLm(), Bert(vocab=150, context=48, layers=1, width=16, heads=2, hidden=32)),
    (
        SeqToSeq(),
        T5(vocab=150, context=48, width=16, encoder_layers=1, decoder_layers=1, heads=2, head_dim=8, hidden=32),
    ),
]


@pytest.mark.parametrize(("objective", "model"), CASES, ids=["masked", "encoder-decoder"])
def test_the_two_parts_add_up(objective: Any, model: Any) -> None:
    spec, wide = model.spec(), replace(model, width=32).spec()
    own, other = init_params(spec, jax.random.key(0)), init_params(wide, jax.random.key(1))
    batch = {k: jnp.asarray(v) for k, v in random_rows(objective, spec, 2, 48, (0, 0)).items()}
    distilled = Distillation(objective, share=0.25, temperature=3.0, states=0.5)
    sums = jax.jit(lambda p, q: distilled.loss_with({"teacher": Frozen(wide, q)})(spec, p, batch))(own, other)
    alone, told = jax.jit(lambda p: objective.loss(spec, p, batch))(own), sums.aux["metrics"]
    expected = 0.75 * alone.total + 0.25 * 9 * told["teacher_kl"] + 0.5 * told["states_apart"]
    np.testing.assert_allclose(sums.total, expected, rtol=1e-5)
    assert told["teacher_kl"] > 0
    assert told["states_apart"] > 0
    same = replace(distilled, share=1.0)
    itself = jax.jit(lambda p: same.loss_with({"teacher": Frozen(spec, p)})(spec, p, batch))(own)
    np.testing.assert_allclose(itself.total, 0, atol=1e-2)


def test_classes_are_learned_from_a_teachers_probabilities() -> None:
    model = replace(STUDENT, layers=1, task="sequence_classification", classes=3)
    spec, wide = model.spec(), replace(model, width=32).spec()
    # Larger than they start: there the scores are all alike.
    own, other = (
        jax.tree.map(lambda a: np.float32(9) * np.asarray(a), init_params(s, jax.random.key(i)))
        for i, s in enumerate((spec, wide))
    )
    batch = {k: jnp.asarray(v) for k, v in random_rows(Classification(), spec, 2, 32, (0, 0)).items()}
    objective = ClassDistillation(share=0.25, temperature=3.0)
    sums = jax.jit(lambda p, q: objective.loss_with({"teacher": Frozen(wide, q)})(spec, p, batch))(own, other)
    alone = jax.jit(lambda p: objective.evaluated.loss(spec, p, batch))(own)
    scores, asked = jax.jit(objective.scores, static_argnums=0), np.asarray(batch["labels"]) > 0
    ours, theirs = (np.asarray(scores(s, p, batch), np.float64)[asked] / 3 for s, p in ((spec, own), (wide, other)))
    ours, theirs = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (ours, theirs))
    apart = (np.exp(theirs) * (theirs - ours)).sum()
    assert apart > 0.01
    np.testing.assert_allclose(sums.aux["metrics"]["teacher_kl"], apart, rtol=1e-3)
    np.testing.assert_allclose(sums.total, 0.75 * alone.total + 0.25 * 9 * apart, rtol=1e-4)
    np.testing.assert_allclose(sums.nll, alone.nll, rtol=1e-5)
    assert (sums.weight, sums.correct) == (alone.weight, alone.correct)


def test_eight_devices_equal_one() -> None:
    experiment = Experiment(
        model=STUDENT,
        objective=Distillation(top=20, states=0.1),
        optimizer=Sgd(weight_decay=0, clip_norm=0),  # its first step is the gradient
        schedule=Schedule(peak=1.0, warmup=0),
        train=TrainConfig(batch=8, length=32, accumulate=2),
    )
    start = jax.device_get(jax.jit(lambda key: init_state(experiment, key))(jax.random.key(0)))
    frozen = {"teacher": Frozen(TEACHER.spec(), jax.device_get(init_params(TEACHER.spec(), jax.random.key(1))))}
    rows = random_rows(experiment.objective, STUDENT.spec(), 8, 32, (0, 0))

    def stepped(mesh: MeshConfig, count: int) -> tuple[Any, Any]:
        sharding = Sharding(build_mesh(mesh, jax.devices()[:count]), Rules())
        shardings = state_shardings(experiment, sharding, frozen)
        state = jax.device_put(replace(start, frozen=frozen), shardings, may_alias=False)
        batch = jax.device_put(rows, sharding.named(BATCH))
        after, told = jax.device_get(jit_step(experiment, sharding, frozen)(state, batch))
        return jax.tree.map(np.subtract, start.params, after.params), told

    (one, told), (eight, same) = stepped(MeshConfig(data=1), 1), stepped(MeshConfig(fsdp=2, sequence=2, tensor=2), 8)
    for name in ("loss", "teacher_kl", "states_apart", "grad_norm"):
        np.testing.assert_allclose(same[name], told[name], rtol=1e-5)
    assert told["learning_rate"] == 1
    largest = max(float(np.abs(a).max()) for a in jax.tree.leaves(one))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=0)


def test_states_apart_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 6))
    segments = np.array([[1, 1, 0, 1, 2], [1, 1, 2, 2, 2]])
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)  # noqa: E731
    total = 0.0
    for a, b, own in zip(unit(ours), unit(theirs), segments, strict=True):
        for i in np.flatnonzero(own):
            total += np.mean([(a[i] @ a[j] - b[i] @ b[j]) ** 2 for j in np.flatnonzero(own == own[i])])
    arrays, apart = (np.float32(ours), np.float32(theirs), segments), jax.jit(states_apart)
    np.testing.assert_allclose(apart(*arrays), total, rtol=1e-5)
    alike = ((segments > 0) * (1 - (unit(ours) * unit(theirs[..., :4])).sum(-1))).sum()
    np.testing.assert_allclose(apart(arrays[0], arrays[1][..., :4], arrays[2]), alike, rtol=1e-5)


WRONG = {
    "names no model": {"objective": Distillation()},
    "no directory /nowhere": {"objective": Distillation(teacher="/nowhere")},
    "share is 2": {"objective": Distillation(share=2)},
    "both models must predict the same": {"model": replace(STUDENT, vocab=400)},
    "shorter than train.length": {"model": replace(STUDENT, context=128), "train": TrainConfig(steps=2, length=128)},
    "has no place for a teacher": {
        "model": replace(STUDENT, layers=2),
        "pipeline": PipelineConfig(schedule="1f1b", microbatches=2),
        "mesh": MeshConfig(data=4, stage=2),
    },
}


@pytest.mark.parametrize("said", WRONG)
def test_what_does_not_fit_is_one_sentence(said: str, student: Experiment, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        train(replace(student, **WRONG[said]), tmp_path / "run")


def test_a_teacher_of_other_tokens_or_rows_is_refused(student: Experiment, teacher: Path, tmp_path: Path) -> None:
    data = replace(student.data, held_out=0.3)  # the BPE is trained on other documents
    with pytest.raises(UserError, match="another tokenizer"):
        train(replace(student, data=data), tmp_path / "run")
    prepared = prepare(student.data, progress=False)
    model = T5(vocab=320, context=64, width=16, encoder_layers=1, decoder_layers=1, heads=2, head_dim=8, hidden=32)
    other = replace(student, model=model, objective=Distillation(PrefixLm(), teacher=str(teacher)))
    with pytest.raises(UserError, match="is a llama, whose rows are others than those of a t5"):
        load_frozen(other, Sharding(build_mesh(MeshConfig(data=1), jax.devices()[:1]), Rules()), prepared)
