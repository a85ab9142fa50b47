"""Configurations go to a file and back exactly, and say what is wrong with a file."""

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from lmx import config
from lmx.checkpoint.config import CheckpointConfig
from lmx.config import Change, diff, from_data, to_data
from lmx.data.config import LocalFiles, PythonStdlib
from lmx.errors import UserError
from lmx.experiment import EvalConfig, Experiment, SampleConfig, TrainConfig
from lmx.models.families.bert import Bert
from lmx.objectives.class_distillation import ClassDistillation
from lmx.objectives.classification import Classification
from lmx.objectives.distillation import Distillation
from lmx.objectives.fill_in_the_middle import FillInTheMiddle
from lmx.objectives.next_token import NextToken
from lmx.objectives.preference import Ipo, Preference
from lmx.optim.catalogue import AdEMAMix, Muon
from lmx.optim.optimizer import AdamW
from lmx.optim.schedule import Schedule

CONFIGS = Path(__file__).parents[1] / "configs"


def recipes() -> dict[str, Callable[[], Experiment]]:
    """Every public function of the files in configs/."""
    found = {}
    for file in sorted(CONFIGS.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(CONFIGS)  # a recipe may derive from another beside it
            spec.loader.exec_module(module)
        own = {n: f for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__}
        found |= {f"{file.name}:{n}": f for n, f in own.items() if callable(f) and not n.startswith("_")}
    return found


RECIPES = recipes()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_sound_and_goes_to_a_file_and_back_exactly(name: str, tmp_path: Path) -> None:
    experiment = RECIPES[name]()
    experiment.check()
    config.save(experiment, tmp_path / "experiment.json")
    back = config.load(Experiment, tmp_path / "experiment.json")
    assert back == experiment
    assert type(back.model) is type(experiment.model)
    assert diff(experiment, back) == ()


def test_the_quickstart_saves_while_it_trains() -> None:
    quickstart = RECIPES["quickstart.py:quickstart"]()
    assert 0 < quickstart.checkpoint.every < quickstart.train.steps / 2


def test_the_recipes_of_the_readme_are_there() -> None:
    files = {name.partition(":")[0] for name in RECIPES}
    assert {"quickstart.py", "gpt2.py", "llama.py"} <= files


@dataclass(frozen=True)
class Shape:
    """Base class."""


@dataclass(frozen=True)
class Circle(Shape):
    """Has a radius."""

    radius: float = 1.0


@dataclass(frozen=True)
class Drawing:
    """A little of everything."""

    shape: Shape = Circle()
    shapes: tuple[Shape, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    name: str | None = None
    style: Literal["line", "dots"] = "line"
    filled: bool = False
    width: float = 0.5


@pytest.mark.parametrize(
    "drawing",
    [
        Drawing(),
        Drawing(Shape(), (Circle(0.1), Shape(), Circle(1e-300)), (7, math.pi), "é\n日本", "dots", True, 1e22),
        Drawing(name="", width=-0.0),
    ],
)
def test_values_of_every_kind_survive_json(drawing: Drawing) -> None:
    back = from_data(Drawing, json.loads(json.dumps(to_data(drawing))))
    assert back == drawing
    assert repr(back) == repr(drawing)  # also the sign of a zero, and the types


def test_what_people_write_becomes_what_a_file_gives_back() -> None:
    loose: Any = Drawing(Circle(2), [Shape(), Circle(3)], [4, 5], width=6)  # type: ignore[arg-type]
    assert repr(config.typed(loose)) == repr(Drawing(Circle(2.0), (Shape(), Circle(3.0)), (4, 5.0), width=6.0))


def test_a_class_of_the_same_name_is_not_taken_for_another() -> None:
    @dataclass(frozen=True)
    class Base:
        part: Any = None

    first, second = (dataclass(frozen=True)(type("Same", (Base,), {})) for _ in range(2))

    @dataclass(frozen=True)
    class Pair:
        one: Base
        two: Base

    pair = config.typed(Pair(first(), second()))
    assert [type(pair.one), type(pair.two)] == [first, second]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"width": "1"}, "width is '1', expected float"),
        ({"filled": 1}, "filled is 1, expected bool"),
        ({"shape": 3}, "shape is 3, expected Shape"),
        ({"shapes": Shape()}, r"shapes is Shape\(\), expected a list"),
        ({"shapes": [Circle("2")]}, "shapes.0.radius is '2', expected float"),  # type: ignore[arg-type]
        ({"pair": (1, 2, 3)}, r"pair is \(1, 2, 3\), expected a list of 2"),
        ({"style": "dashes"}, "style is 'dashes', expected"),
        ({"name": Path("a")}, r"name is PosixPath\('a'\), expected str"),
    ],
)
def test_what_people_write_wrongly_is_named(wrong: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        config.typed(Drawing(**wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widht": 1}, r"unknown key 'widht'; Drawing has width"),
        ({"width": "wide"}, r"width is 'wide', expected float"),
        ({"width": True}, r"width is True, expected float"),
        ({"filled": 1}, r"filled is 1, expected bool"),
        ({"style": "dotted"}, r"style is 'dotted', expected"),
        ({"pair": [1]}, r"pair is \[1\], expected a list of 2"),
        ({"pair": [1.5, 2]}, r"pair\.0 is 1\.5, expected int"),
        ({"name": 3}, r"name is 3"),
        ({"shape": {"type": "Cirkle", "radius": 1}}, r"shape has type 'Cirkle', expected one of Circle"),
        ({"shape": {"type": "Circle"}}, r"shape lacks the key 'radius' of Circle"),
        ({"shapes": {"type": "Circle"}}, r"shapes is .*, expected a list"),
        ({"shape": 3}, r"shape is 3, expected an object of type Shape"),
    ],
)
def test_a_wrong_file_is_explained_by_path_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_data(Drawing, {**to_data(Drawing()), **changes})


def test_files_that_are_no_configuration_are_named(tmp_path: Path) -> None:
    file = tmp_path / "experiment.json"
    with pytest.raises(UserError, match=r"there is no configuration file .*experiment\.json"):
        config.load(Drawing, file)
    file.write_text('{"type": "Drawing"')
    with pytest.raises(UserError, match=r"experiment\.json is not a JSON configuration"):
        config.load(Drawing, file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"experiment\.json is not a JSON configuration"):
        config.load(Drawing, file)
    file.write_text('{"type": "Drawing"}')
    with pytest.raises(UserError, match=r"experiment\.json: the configuration lacks the key 'filled'"):
        config.load(Drawing, file)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("train", TrainConfig(steps=0), "train.steps is 0, expected at least 1"),
        ("train", TrainConfig(ema=1.0), "train.ema is 1.0, expected at least 0 and below 1"),
        ("train", TrainConfig(token_swap=-0.1), "train.token_swap is -0.1"),
        ("eval", EvalConfig(every=-1), "eval.every is -1"),
        ("eval", EvalConfig(rows=-1), "eval.rows is -1"),
        ("eval", EvalConfig(patience=-1), "eval.patience is -1"),
        ("eval", EvalConfig(every=0, patience=2), "eval.patience is 2, but eval.every is 0"),
        ("sample", SampleConfig(temperature=-1.0), "sample.temperature is -1.0"),
        ("sample", SampleConfig(tokens=0), "sample.tokens is 0, expected at least 1"),
        (
            "sample",
            SampleConfig(prompts=("a",), tokens=1024),
            "sample.tokens is 1024, expected less than",
        ),
        (
            "model",
            Bert(),
            "a bert with model.task 'token_prediction' continues no text",
        ),
        ("schedule", Schedule(peak=-1.0), "schedule.peak is -1.0, expected at least 0"),
        ("schedule", Schedule(peak=math.nan), "schedule.peak is nan"),
        ("schedule", Schedule(final=1.5), "schedule.final is 1.5, expected at least 0 and at most 1"),
        ("schedule", Schedule(decay=-0.1), "schedule.decay is -0.1"),
        ("optimizer", AdamW(clip_norm=-1.0), "optimizer.clip_norm is -1.0"),
        ("optimizer", AdamW(weight_decay=-0.1), "optimizer.weight_decay is -0.1"),
        ("optimizer", AdamW(b1=1.0), "optimizer.b1 is 1.0"),
        ("optimizer", AdamW(b2=1.5), "optimizer.b2 is 1.5"),
        ("optimizer", AdamW(eps=0.0), "optimizer.eps is 0.0, expected above 0"),
        ("optimizer", AdEMAMix(b3=0.0), "optimizer.b3 is 0.0, expected above 0 and below 1"),
        ("optimizer", Muon(iterations=0), "optimizer.iterations is 0"),
        ("objective", NextToken(label_smoothing=3.0), "objective.label_smoothing is 3.0"),
        ("objective", NextToken(z_loss=-1.0), "objective.z_loss is -1.0"),
        ("objective", Classification(label_smoothing=1.0), "objective.label_smoothing is 1.0"),
        ("objective", Distillation(temperature=0.0), "objective.temperature is 0.0, expected above 0"),
        ("objective", ClassDistillation(share=1.5), "objective.share is 1.5, expected at least 0 and at most 1"),
        ("objective", Preference(preference=Ipo(tau=0.0)), "objective.preference.tau is 0.0, expected above 0"),
        ("objective", FillInTheMiddle(rate=-0.5), "objective.rate is -0.5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(part: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(Experiment(sample=SampleConfig(prompts=("a",))), **{part: value}).check()


def test_the_best_checkpoint_needs_evaluations() -> None:
    best = Experiment(checkpoint=CheckpointConfig(keep_best=True))
    best.check()
    with pytest.raises(UserError, match=r"checkpoint\.keep_best is set, but eval\.every is 0"):
        replace(best, eval=EvalConfig(every=0)).check()


def test_what_a_configuration_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot hold"):
        to_data(replace(Drawing(), name=object()))  # type: ignore[arg-type]


def test_differences_name_the_leaves_and_the_classes() -> None:
    before = Experiment()
    assert diff(before, before) == ()
    sources = (LocalFiles(files=("a.txt",)), PythonStdlib())
    after = replace(
        before,
        train=replace(before.train, steps=7),
        data=replace(before.data, sources=sources),
    )
    changes = {c.path: c for c in diff(before, after)}
    assert changes["train.steps"] == Change("train.steps", 1000, 7)
    assert str(changes["train.steps"]) == "train.steps: 1000 -> 7"
    assert changes["data.sources.0.type"].after == "LocalFiles"
    assert changes["data.sources.0.files.0"] == Change("data.sources.0.files.0", None, "a.txt")
    assert changes["data.sources.1.weight"].before is None
    assert not any(path.startswith("model") for path in changes)
