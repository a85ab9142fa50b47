"""The recipes train on a tiny override, and give the same numbers on every mesh."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmx.cli.recipes import load_recipe
from lmx.data.config import DataConfig, LocalFiles, PythonStdlib
from lmx.experiment import Experiment
from lmx.models.families.mixtral import Mixtral
from lmx.sharding.mesh import MeshConfig
from lmx.train.check_mesh import check_mesh
from lmx.train.run import train

CONFIGS = Path(__file__).parents[2] / "configs"
STACKS = ("--model.encoder-layers", "1", "--model.decoder-layers", "1", "--model.heads", "2", "--model.head-dim", "8")
SMALL: dict[str, tuple[str, ...]] = {
    "bert.py": ("--model.layers", "1", "--model.heads", "2"),
    "bert.py:modern": ("--model.layers", "2", "--model.heads", "2"),
    "t5.py": (*STACKS, "--objective.sentinels", "12"),
    "transformer.py": ("--model.layers", "1", "--model.heads", "2", "--objective.target-length", "32"),
}
TINY = ("--model.vocab", "384", "--data.tokenizer.vocab-size", "384", "--model.width", "16", "--model.hidden", "32")
SHORT = ("--train.steps", "3", "--train.batch", "8", "--train.length", "64", "--schedule.warmup", "1")


def small(recipe: str) -> Experiment:
    return load_recipe(str(CONFIGS / recipe), [*TINY, *SHORT, *SMALL[recipe]])


@pytest.mark.parametrize(
    "recipe", ["bert.py:modern", *(pytest.param(r, marks=pytest.mark.slow) for r in ("t5.py", "transformer.py"))]
)
def test_a_recipe_trains_and_is_evaluated(
    recipe: str, documents: DataConfig, pairs: DataConfig, tmp_path: Path
) -> None:
    base = small(recipe)
    assert isinstance(base.data.sources[0], PythonStdlib)
    given = pairs if recipe == "transformer.py" else documents
    data = replace(base.data, sources=given.sources, held_out=0.1)
    summary = train(replace(base, data=data), tmp_path / "run")
    assert summary["steps"] == 3
    assert 0 < summary["eval_loss"] < 8
    assert 0 < summary["eval_baseline_accuracy"] < 1
    assert ("eval_pair_accuracy" in summary) == (recipe == "bert.py:modern")


def mixture_of_experts() -> Experiment:
    sizes: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "hidden": 32}
    base = small("bert.py")
    model = Mixtral(vocab=384, context=64, experts=4, experts_per_token=2, **sizes)
    return replace(base, model=model, objective=Experiment().objective, data=DataConfig(sources=(LocalFiles(),)))


@pytest.mark.parametrize(
    "recipe",
    ["bert.py", *(pytest.param(r, marks=pytest.mark.slow) for r in ("transformer.py", "t5.py", "mixture of experts"))],
)
def test_a_mesh_gives_the_same_numbers(recipe: str) -> None:
    experiment = small(recipe) if recipe in SMALL else mixture_of_experts()
    check_mesh(experiment, [MeshConfig(data=2, sequence=2, tensor=2)], steps=1).verify()
