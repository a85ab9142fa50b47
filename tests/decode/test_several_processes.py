"""A job of two processes with four devices each: generate, eval and tasks on a mesh across both, as one device does."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jobs import WORDS, environment

import lmx
from lmx.checkpoint.huggingface import export_params
from lmx.cli.main import main
from lmx.data.config import DataConfig, LocalFiles, TokenizerFile
from lmx.data.tokenizer import train_bpe
from lmx.eval.perplexity import evaluate
from lmx.models.families.llama import Llama
from tests.jitted import init_params

PROMPTS = ["the cat", "two dogs run by a mat and saw", "on"]
GENERATE = ["generate", "model", "--max-new-tokens", "6", "--temperature", "0", "--json", "text.json"]
EVAL = ["eval", "model", "--files", "held_out.txt", "--length", "32", "--json", "score.json"]
TASKS = ["eval", "model", "--tasks", "quiz.py:quiz", "quiz.py:written", "--files", "quiz.jsonl", "--json", "quiz.json"]
QUIZ = """
from lmx.eval.tasks import Generation, MultipleChoice


def quiz():
    return MultipleChoice(prompt="{question}", choices="options", answer="answer")


def written():
    return Generation(prompt="{question}", references="reference", metrics=("exact_match",), max_new_tokens=5)
"""
MESH = ["--layout", "2d", "--mesh.tensor", "4"]
JOB = f"""
import json, sys
import lmx.cli.runtime as runtime
from lmx.checkpoint.huggingface.files import Entry
from lmx.cli.main import main

read, whole = [], Entry.read
def counted(entry, rows=slice(None)):
    array = whole(entry, rows)
    read.append(array.nbytes)
    return array
Entry.read = counted
assert main({[*GENERATE, *MESH, "--prompt", *PROMPTS]!r}) == 0
runtime.start_jax = lambda cluster: None  # it is, already
bytes_read = sum(read)
assert main({[*EVAL, *MESH]!r}) == 0
assert main({[*TASKS, *MESH]!r}) == 0
from lmx.sharding.processes import index
print("process", index(), "read", bytes_read, flush=True)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory and a text."""
    root = tmp_path_factory.mktemp("several")
    sizes = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 4, "head_dim": 8, "hidden": 64}
    config = Llama(vocab=300, context=128, **sizes)
    params = init_params(config.spec(), jax.random.key(1))
    params = jax.tree.map(lambda a: a * 8 if a.ndim > 2 else a, params)
    export_params(config, params, root / "model", config.to_huggingface())
    train_bpe(iter([" ".join(WORDS) * 20]), 300).save(root / "model")
    rng = np.random.default_rng(0)
    (root / "held_out.txt").write_text("\n\n".join(" ".join(rng.choice(WORDS, size=30)) for _ in range(30)))
    (root / "quiz.py").write_text(QUIZ)
    model, questions = lmx.load(root / "model"), [" ".join(rng.choice(WORDS, size=6)) for _ in range(6)]
    answers = model.generate(questions, max_new_tokens=5, temperature=0)
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        # Every other reference is what this model writes, on one device.
        reference = answer.text.split("\n")[0].strip() if i % 2 else "nobody"
        line = {"question": question, "options": [" a mat", " two dogs"], "answer": i % 2, "reference": reference}
        with (root / "quiz.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    return root


@pytest.fixture(scope="module")
def outputs(root: Path) -> list[str]:
    """What each of the two processes printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = []
    for index in (0, 1):
        place = {"LMX_COORDINATOR": address, "LMX_PROCESSES": "2", "LMX_PROCESS": str(index)}
        output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, "-c", JOB]
        started.append(subprocess.Popen(command, cwd=root, env=environment(4, **place), **output))
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    return outputs


def test_text_is_that_of_one_device(root: Path, outputs: list[str]) -> None:
    expected = lmx.load(root / "model").generate(PROMPTS, max_new_tokens=6, temperature=0)
    found = json.loads((root / "text.json").read_text())["completions"]
    assert [c["text"] for c in found] == [c.text for c in expected]
    np.testing.assert_allclose([c["logprobs"] for c in found], [c.logprobs for c in expected], atol=1e-4)
    assert len({t for c in expected for t in c.tokens}) > 4


def test_scores_are_those_of_one_device(root: Path, outputs: list[str]) -> None:
    tokenizer = TokenizerFile(path=str(root / "model" / "tokenizer.json"))
    data = DataConfig((LocalFiles(files=(str(root / "held_out.txt"),)),), tokenizer, held_out=1.0)
    expected = evaluate(lmx.load(root / "model"), data, length=32)
    found = json.loads((root / "score.json").read_text())
    assert found["targets"] == expected.targets
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)


def test_tasks_are_scored_as_on_one_device(root: Path, outputs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert main([*TASKS[:-1], "alone.json"]) == 0
    found, expected = (json.loads((root / name).read_text())["tasks"] for name in ("quiz.json", "alone.json"))
    assert set(found) == {"quiz", "written"}
    for task in found:
        for name, measure in expected[task]["measures"].items():
            assert found[task]["measures"][name]["value"] == pytest.approx(measure["value"], rel=1e-4), (task, name)
    assert found["written"]["measures"]["exact_match"]["value"] >= 0.5


def test_only_the_first_speaks_and_each_reads_its_rows(root: Path, outputs: list[str]) -> None:
    assert PROMPTS[0] in outputs[0]
    assert "perplexity" in outputs[0]
    assert PROMPTS[0] not in outputs[1]
    assert "perplexity" not in outputs[1]
    size = (root / "model" / "model.safetensors").stat().st_size
    read = [int(text.rsplit("read", 1)[1]) for text in outputs]
    # The maps back to the residual stream have its width as rows, which are split; the others have it as columns.
    assert all(0.5 * size < n < 0.93 * size for n in read), (read, size)
