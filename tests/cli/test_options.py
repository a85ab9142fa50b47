"""A command's own options, read without its recipe."""

import subprocess
import sys

import pytest

from lmx.cli.options import read_options
from lmx.cli.train import Train

RECIPE = ["configs/quickstart.py", "--model.layers", "3", "--optimizer.rates", "*embedding*", "0.1"]


def test_they_are_found_among_those_of_the_recipe() -> None:
    own = ["--run-dir", "runs/a", "--restarts", "2", "--allow-config-change", "model", "train.seed"]
    expected = Train(run_dir="runs/a", restarts=2, allow_config_change=("model", "train.seed"))
    assert read_options("train", Train, [*RECIPE, *own]) == expected
    assert read_options("train", Train, [RECIPE[0], *own, *RECIPE[1:]]) == expected
    assert read_options("train", Train, RECIPE) == Train()


def test_help_and_mistakes_in_the_recipe_are_left_to_its_own_parser() -> None:
    assert read_options("train", Train, ["--help"]) == Train()
    assert read_options("train", Train, [*RECIPE, "--model.layerz", "4"]) == Train()


def test_an_ill_typed_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_options("train", Train, [*RECIPE, "--restarts", "often"])
    assert ended.value.code == 2
    assert "often" in capsys.readouterr().err


def test_a_parent_needs_no_jax() -> None:
    code = (
        "import sys\n"
        "from lmx.cli.options import read_options\n"
        "from lmx.cli.train import Train\n"
        "read_options('train', Train, ['configs/quickstart.py', '--restarts', '1'])\n"
        "sys.exit(' '.join({'jax', 'flax', 'numpy'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
