from dataclasses import replace
from pathlib import Path

import jax
import pytest

from lmx.cli.eval import Eval
from lmx.cli.generate import Generate
from lmx.cli.recipes import ONE, parse, parse_placed, take_layout
from lmx.cli.train import Train
from lmx.errors import UserError
from lmx.experiment import Experiment
from lmx.models.families.llama import Llama
from lmx.models.model import param_axes, param_shapes
from lmx.sharding.layouts import LAYOUTS, SERVING, find_layout
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.sharding.rules import Rules, Sharding

LLAMA = Llama(vocab=512, context=64, layers=4, width=64, heads=8, kv_heads=8, head_dim=8, hidden=128)
SIZES = {
    "ddp": {"data": 64},
    "fsdp": {"fsdp": 64},
    "hsdp": {"data": 8, "fsdp": 8},
    "megatron": {"data": 8, "tensor": 8},
    "2d": {"fsdp": 16, "tensor": 4},
    "3d": {"fsdp": 16, "stage": 2, "tensor": 2},
    "context": {"fsdp": 16, "sequence": 4},
    "expert": {"fsdp": 8, "expert": 8},
    "1d_weight_stationary": {"tensor": 64},
    "2d_weight_stationary": {"fsdp": 2, "tensor": 32},
    "weight_gathered_xy": {"fsdp": 2, "sequence": 2, "tensor": 16},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_a_sentence_and_fits_any_number_of_devices(name):
    layout = LAYOUTS[name]
    assert layout.when.endswith(".")
    for devices in (1, 2, 6, 8):
        sharding = Sharding(build_mesh(layout.mesh, jax.devices()[:devices]), layout.rules)
        if devices != 6:  # which does not divide 8 heads
            sharding.check_divides(param_axes(LLAMA.spec()), param_shapes(LLAMA.spec()))
    sizes = {axis: size for axis, size in layout.mesh.sizes(64).items() if size > 1}
    assert sizes == SIZES.get(name, sizes)


def test_serving_layouts_store_parameters_alike():
    """So that prompts may be read with one and tokens written with another without moving a weight."""
    names = [name for name in vars(Rules()) if not name.startswith("act_") and name != "kv_heads"]
    stored = {tuple(getattr(layout.rules, name) for name in names) for layout in SERVING.values()}
    assert len(stored) == 1


def test_an_unknown_layout_is_refused_with_the_list():
    with pytest.raises(UserError, match="there is no layout 'megatorn'; the layouts are ddp, fsdp, hsdp, megatron, 2d"):
        find_layout("megatorn")
    with pytest.raises(UserError, match="there is no layout ''"):
        take_layout(["--layout"])


def test_a_recipe_takes_a_layout():
    laid = Experiment().laid_out("megatron")
    assert (laid.mesh, laid.rules) == (LAYOUTS["megatron"].mesh, LAYOUTS["megatron"].rules)
    assert replace(laid, mesh=MeshConfig(), rules=Rules()) == Experiment()


@pytest.mark.parametrize("given", [["--layout", "2d"], ["--layout=2d"]])
def test_other_options_override_a_layout_wherever_they_stand(given):
    for argv in (["model", *given, "--mesh.tensor", "2"], ["--mesh.tensor", "2", "model", *given]):
        options, place = parse_placed("generate", Generate, argv)
        assert options.model == "model"
        assert place.mesh == replace(LAYOUTS["2d"].mesh, tensor=2)
        assert place.rules == LAYOUTS["2d"].rules


def test_a_recipe_of_the_command_line_takes_a_layout_and_keeps_what_it_says():
    recipe = str(Path(__file__).parents[2] / "configs" / "quickstart.py")
    experiment = parse("train", Train, [recipe, "--layout", "megatron", "--mesh.tensor", "2"])[1].experiment
    assert experiment.mesh == replace(LAYOUTS["megatron"].mesh, tensor=2)
    assert experiment.rules == LAYOUTS["megatron"].rules
    plain = parse("train", Train, [recipe])[1].experiment
    assert replace(experiment, mesh=plain.mesh, rules=plain.rules) == plain


def test_without_options_a_model_lies_on_one_device_by_its_own_rules():
    place = parse_placed("eval", Eval, ["model"])[1]
    assert (place.mesh, place.rules) == (None, None)
    place = parse_placed("eval", Eval, ["model", "--mesh.data", "-1", "--rules.kv-heads"])[1]
    assert place.mesh == replace(ONE, data=-1)
    assert place.rules == Rules(kv_heads=())
