"""``lmx eval --tasks``, ``--harness``, ``--stride`` and ``lmx inspect`` from the command line."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from lmx.checkpoint.checkpointer import Checkpointer
from lmx.cli.main import main
from lmx.config import save
from lmx.data.tokenizer import train_bpe
from lmx.experiment import Experiment, RunDir
from lmx.models.families.llama import Llama
from tests.jitted import init_params

TASK = """
from dataclasses import replace

from lmx.eval.tasks import MultipleChoice


def quiz() -> MultipleChoice:
    return MultipleChoice(prompt="{question}", choices=("cat", "dog"), answer="answer")


def shots() -> MultipleChoice:
    return replace(quiz(), shots=1)


def none() -> int:
    return 3
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never trained, a task file, examples, and a text."""
    root = tmp_path_factory.mktemp("eval-tasks")
    model = Llama(vocab=300, context=64, layers=1, width=16, heads=2, kv_heads=2, head_dim=8, hidden=32)
    experiment, run = Experiment(model=model), RunDir(root / "run")
    run.path.mkdir()
    save(experiment, run.experiment)
    train_bpe(iter(["the cat and the dog sat on a mat " * 20]), 300).save(run.tokenizer)
    with Checkpointer(run.checkpoints_of(experiment), experiment.checkpoint) as checkpointer:
        checkpointer.save(7, {"params": init_params(model.spec(), jax.random.key(3))}, {})
    (root / "quiz.py").write_text(TASK)
    rows = [{"question": f"number {i} is a", "answer": ("cat", "dog")[i % 2]} for i in range(4)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "text.txt").write_text("the cat and the dog sat on a mat " * 20)
    return root


def code(*arguments: Any) -> int:
    return main([str(a) for a in arguments])


def test_tasks_are_told_as_a_table_and_as_json(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    task, out = place / "quiz.py", place / "result.json"
    asked = ("eval", place / "run", "--tasks", task, f"{task}:shots", "--files", place / "rows.jsonl", "--seed", 3)
    assert code(*asked, "--mesh.data", 4, "--mesh.tensor", 2, "--json", out) == 0
    shown = capfd.readouterr().out
    assert "accuracy_per_byte" in shown
    assert "+- is the standard error: s / sqrt(n)" in shown
    told = json.loads(out.read_text())
    assert told["step"] == 7
    assert told["command"][:2] == ["lmx", "eval"]
    assert told["configuration"]["seed"] == 3
    assert told["configuration"]["mesh"] == {"data": 4, "tensor": 2}
    assert told["versions"]["jax"] == jax.__version__
    assert set(told["tasks"]) == {"quiz", "shots"}
    found = told["tasks"]["shots"]
    assert (found["n"], found["configuration"]["shots"], found["configuration"]["type"]) == (4, 1, "MultipleChoice")
    assert set(found["measures"]["accuracy"]) == {"value", "stderr", "method", "n", "higher_is_better"}


def test_a_sliding_context_is_stated(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("eval", place / "run", "--files", place / "text.txt", "--stride", 16, "--length", 32, "--json", "-")
    assert code(*asked) == 0
    told = json.loads(capfd.readouterr().out)["tasks"]["text"]
    assert told["configuration"] == {"type": "sliding", "length": 32, "stride": 16, "documents": 0}
    assert "windows of 32 tokens with a stride of 16" in told["notes"]["context"]
    assert told["measures"]["loss"]["value"] == pytest.approx(5.7, abs=0.5)  # nothing was learned: log(300)


def test_inspect_writes_a_page_and_its_numbers(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = place / "pages" / "inside.html"
    assert code("inspect", place / "run", "--text", "the cat", "--out", page, "--json", place / "inside.json") == 0
    assert capfd.readouterr().out.strip() == str(page)
    assert page.read_text().startswith("<!doctype html>")
    told = json.loads((place / "inside.json").read_text())
    assert len(told["predictions"]) == len(told["tokens"])


WRONG = {
    "no such task": (("--tasks", "DIR/nowhere.py"), "there is no task file"),
    "no such function": (("--tasks", "DIR/quiz.py:quizz"), "has no task function 'quizz'; it has quiz"),
    "another type": (("--tasks", "DIR/quiz.py:none"), "returned int, expected an lmx.Task"),
    "no files": (("--tasks", "DIR/quiz.py"), "quiz: the task MultipleChoice has no files"),
    "idle option": (("--tasks", "DIR/quiz.py", "--stride", "3"), "--stride has no effect on tasks"),
    "no tasks": (("--shots", "2"), "--shots has no effect without tasks"),
    "both": (("--tasks", "DIR/quiz.py", "--harness", "x"), "both given"),
    "data and files": (("--data", "x.py", "--files", "DIR/text.txt"), "--data and --files were both given"),
    "stride": (("--files", "DIR/text.txt", "--stride", "99"), "expected 0 < stride <= length"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_sentence(place: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    arguments, said = WRONG[case]
    assert code("eval", place / "run", *(a.replace("DIR", str(place)) for a in arguments)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (sentence,) = [line for line in err.splitlines() if line.startswith("lmx ")]
    assert said in sentence
