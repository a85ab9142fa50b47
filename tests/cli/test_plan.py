import json
from pathlib import Path

import jax
import pytest

from lmx.cli.main import main

RECIPE = """
from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.llama import Llama


def tiny():
    model = Llama(vocab=128, context=32, layers=1, width=16, heads=2, kv_heads=2, head_dim=8, hidden=32)
    return Experiment(model=model, train=TrainConfig(batch=8, length=32, remat="none"))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    jax.devices()  # the command must not change how many the other tests have
    (tmp_path / "tiny.py").write_text(RECIPE, encoding="utf-8")
    return str(tmp_path / "tiny.py")


def test_a_plan(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    options = ["--topology", "cpu:2", "--formulas", "True", "--json", str(file), "--mesh.data", "2"]
    assert main(["plan", recipe, *options]) == 0
    shown = capsys.readouterr().out
    assert "(cpu:2), data 2" in shown
    assert "gradients" in shown
    data = json.loads(file.read_text())
    assert data["mesh"]["data"] == data["devices"] == 2
    (row,) = data["communication"]
    assert row["axes"] == "data"
    assert row["measured"] == pytest.approx(row["formula"], rel=0.01)
    assert data["compile_seconds"] > 0 < data["working_bytes"]


def test_mistakes(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--topology", "v5p"]) == 2
    assert "expected a kind of TPU and its chips as v5p:2x2x2, or cpu:8" in capsys.readouterr().err
    assert main(["plan", recipe, "--topology", "cpu:2", "--effort", "3"]) == 2
    assert "--effort is 3.0" in capsys.readouterr().err
    assert main(["plan", recipe, "--topology", "cpu:2", "--mesh.data", "3"]) == 2
    assert "takes 3 devices, but there are 2" in capsys.readouterr().err
