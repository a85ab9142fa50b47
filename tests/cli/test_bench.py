"""``lmx bench``: the names that scripts read, and that the figures of one object agree with each other."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmx.cli.main import main

RECIPE = """
from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.t5 import T5
from lmx.models.families.gpt2 import Gpt2
from lmx.objectives.denoising import SpanCorruption

TRAIN = TrainConfig(batch=8, length=16, remat="none")


def decoder() -> Experiment:
    return Experiment(model=Gpt2(vocab=90, context=32, layers=1, width=16, heads=2), train=TRAIN)


def encoder_decoder() -> Experiment:
    sizes = dict(encoder_layers=1, decoder_layers=1, width=16, heads=2, head_dim=8, hidden=16)
    objective = SpanCorruption(sentinels=8, target_length=8)
    return Experiment(model=T5(vocab=90, context=32, **sizes), train=TRAIN, objective=objective)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.py"
    path.write_text(RECIPE)
    return path


def measured(command: list[str], file: Path) -> dict[str, Any]:
    assert main(["bench", *command, "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", ["decoder", "encoder_decoder"])
def test_training_in_one_object(name: str, recipe: Path, tmp_path: Path) -> None:
    found = measured(["train", f"{recipe}:{name}", "--batch", "16", "--steps", "2"], tmp_path / "train.json")
    assert found["tokens_per_second"] == pytest.approx(16 * 16 / found["step_seconds"])
    assert found["fraction_of_peak"] == pytest.approx(
        found["model_flops_per_second"] / found["matmul_flops_per_second"]
    )
    assert (found["batch"], found["length"], found["steps"], found["devices"]) == (16, 16, 2, 8)
    assert min(found["compile_seconds"], found["peak_memory_bytes"], found["parameters"]) > 0


def test_decoding_in_one_object(recipe: Path, tmp_path: Path) -> None:
    sizes = ["--batch", "2", "--prompt-length", "5", "--new-tokens", "6", "--repeats", "1"]
    found = measured(["decode", f"{recipe}:decoder", *sizes], tmp_path / "decode.json")
    assert found["tokens_per_second"] == pytest.approx(12 / (found["prefill_seconds"] + 6 * found["step_seconds"]))
    assert (found["batch"], found["prompt_length"], found["new_tokens"]) == (2, 5, 6)
    assert min(found["fraction_of_peak"], found["memory_bytes_per_second"], found["peak_memory_bytes"]) > 0


def test_what_cannot_be_measured_is_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, says in (
        (["decode", f"{recipe}:decoder", "--prompt-length", "30", "--new-tokens", "9"], "model's context of 32"),
        (["train", f"{recipe}:decoder", "--steps", "0"], "--steps is 0, expected at least 1"),
        (["speed"], "lmx bench train RECIPE"),
    ):
        assert main(["bench", *command]) == 2
        assert says in capsys.readouterr().err
