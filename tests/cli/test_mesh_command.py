"""``lmx check mesh``: what it prints, and what it says of meshes that do not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmx.cli.main import main
from lmx.experiment import Experiment
from lmx.train import check_mesh
from lmx.train.check_mesh import MeshCheck, Trial

RECIPES = """
from dataclasses import replace

from lmx.experiment import Experiment, TrainConfig
from lmx.models.families.mixtral import Mixtral
from lmx.models.schedules import PipelineConfig


def odd() -> Experiment:
    sizes = dict(layers=2, width=8, heads=2, kv_heads=2, head_dim=4, hidden=8)
    return Experiment(
        model=Mixtral(vocab=60, context=28, experts=4, **sizes),
        train=TrainConfig(batch=12, length=28, remat="none"),
    )


def wider() -> Experiment:
    return replace(odd(), train=replace(odd().train, batch=24))
"""
SAYS = {
    "tensor=4": "'kv_heads' of stack/segment_0/block_0/attention/key/kernel into 4 (mesh axes tensor), which does not "
    "divide its size 2; choose a mesh that splits it into 2, the nearest number that divides it",
    "expert=8": "into 8 (mesh axes expert), which does not divide its size 4; choose a mesh that splits it into 4",
    "sequence=8": "which does not divide the length 28; the nearest length that it divides is 32",
    "data=8": "into 8, which does not divide the 12 sequences of a microbatch (train.batch / train.accumulate); the "
    "nearest number that it divides is 16",
    "stage=4": "4 stages of 1 chunks do not divide the 2 repeats (one layer each) of the stack's longest segment; the "
    "nearest that they divide is 4 repeats",
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "odd.py"
    path.write_text(RECIPES)
    return path


def test_a_table_and_why_meshes_are_skipped(recipes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = recipes.parent / "result.json"
    command = ["check", "mesh", str(recipes), "--mesh", "stage=2", *SAYS, "--steps", "1", "--json", str(result)]
    assert main(command) == 0
    out, err = capfd.readouterr()
    assert "stage=2: pipeline gpipe: 2 stages, 6 microbatches, bubble 14.3%" in out
    assert "the same on 1 meshes, up to rounding" in out
    assert "sent in a step, by mesh axis" in out
    for mesh, sentence in SAYS.items():
        (said,) = (line for line in out.splitlines() if line.startswith(f"skipped {mesh}: "))
        assert sentence in said
    assert "odd: stage=2 (1 of 6)" in err
    data = json.loads(result.read_text())
    assert data["same"]
    trial = data["recipes"]["odd"]["trials"][1]
    assert trial["sent_bytes_per_device"]["stage"] > 0
    assert trial["emptied"] == 0


def test_several_recipes(recipes: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One command, a table for each; the command fails if one of them does."""

    def checked(experiment: Experiment, meshes: Any, steps: int, say: Any) -> MeshCheck:
        single = Trial({"data": 1}, loss=(1.0,), grad_norm=(1.0,))
        other = replace(single, mesh={"data": 2}, loss_difference=1e-3 * (experiment.train.batch == 24))
        return MeshCheck(8, steps, 1e-5, (single, other))

    monkeypatch.setattr(check_mesh, "check_mesh", checked)
    assert main(["check", "mesh", str(recipes), f"{recipes}:wider", "--json", "-"]) == 1
    out, err = capfd.readouterr()
    assert "lmx check: wider: the loss on the mesh data=2 differs from one device's by 1.0e-03" in err
    found = json.loads(out)
    assert not found["same"]
    assert {name: check["same"] for name, check in found["recipes"].items()} == {"odd": True, "wider": False}
    assert main(["check", "mesh", str(recipes), f"{recipes}:wider", "--train.batch", "12"]) == 0
    assert capfd.readouterr().out.count("the same on 1 meshes") == 2


def test_meshes_of_other_numbers_of_devices(recipes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "mesh", str(recipes), "--mesh", "data=3,tensor=4"]) == 2
    assert "takes 12 devices, but there are 8; choose sizes whose product is 8 (the nearest: data 2 x tensor 4)" in (
        capfd.readouterr().err
    )
