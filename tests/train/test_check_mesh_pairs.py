"""Every pair of mesh axes, and every kind of model: the recipes of ``lmx check mesh``, on a part of its meshes."""

import itertools
from pathlib import Path

import pytest

from lmx.cli.mesh import parse_mesh
from lmx.cli.recipes import load_recipe
from lmx.train.check_mesh import AXES, check_mesh

RECIPES = Path(__file__).parents[2] / "configs" / "check.py"
MESHES = {
    "decoder": ("fsdp=2,stage=2,sequence=2", "stage=2,expert=2,tensor=2"),
    "encoder": ("data=2,stage=2,sequence=2", "data=2,fsdp=2,tensor=2"),
    "encoder_decoder": ("expert=2,sequence=2,tensor=2",),
    "mixture": ("data=2,fsdp=2,expert=2", "data=2,stage=2,expert=2"),
    "dropless": ("stage=2,expert=2,sequence=2",),
}


def test_the_meshes_have_every_pair_of_axes() -> None:
    triples = [[part.partition("=")[0] for part in mesh.split(",")] for meshes in MESHES.values() for mesh in meshes]
    covered = {frozenset(pair) for triple in triples for pair in itertools.combinations(triple, 2)}
    assert covered == {frozenset(pair) for pair in itertools.combinations(AXES, 2)}


@pytest.mark.parametrize("kind", MESHES)
def test_the_same_numbers(kind: str) -> None:
    experiment = load_recipe(f"{RECIPES}:{kind}")
    checked = check_mesh(experiment, [parse_mesh(mesh) for mesh in MESHES[kind]])
    assert [trial.skipped for trial in checked.trials] == [None] * (1 + len(MESHES[kind]))
    checked.verify()
    assert max(trial.param_difference for trial in checked.trials) < 0.05
    if kind == "mixture":
        assert 0 < max(trial.emptied for trial in checked.trials) < experiment.train.batch


@pytest.mark.slow
@pytest.mark.parametrize("kind", MESHES)
def test_the_same_numbers_on_all_meshes(kind: str) -> None:
    check_mesh(load_recipe(f"{RECIPES}:{kind}")).verify()
