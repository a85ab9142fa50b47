"""Recipes and command lines: ``path/to/file.py`` or ``path/to/file.py:function``, and typed dotted overrides."""

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar, cast

import tyro

from lmx.cli.options import CONFIG, Options
from lmx.config import nearest, typed
from lmx.errors import UserError
from lmx.experiment import Experiment
from lmx.sharding.layouts import LAYOUTS, Layout, find_layout
from lmx.sharding.mesh import MeshConfig
from lmx.sharding.rules import Rules

NAMES = ", ".join(LAYOUTS)
Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Recipe:
    """A recipe by its name, with the experiment that it returned and the overrides changed."""

    name: str
    experiment: Experiment


def load_recipe(text: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of ``file.py`` (the function named like the file) or ``file.py:function``, with overrides applied.

    Raises:
      UserError: there is no such file or function, it raises, or it returns something else.
      SystemExit: (code 2) unknown or ill-typed overrides; tyro has named them.
    """
    experiment = _call(text)
    if not overrides:
        return experiment
    return tyro.cli(type(experiment), default=experiment, args=list(overrides), prog=f"lmx ... {text}", config=CONFIG)


ONE = MeshConfig(data=1)
"""A mesh of one device."""
LAYOUT: Any = (
    "layout",
    Annotated[str, tyro.conf.arg(help=f"A mesh and rules by name, which the options of both override: {NAMES}.")],
    field(default=""),
)
"""The option that :func:`take_layout` has read."""


def parse(command: str, options: type[Options], argv: Sequence[str]) -> tuple[Options, Recipe]:
    """Reads ``RECIPE [options] [overrides]``: one parser for the command's options and the recipe's fields.

    ``options`` is a frozen dataclass whose fields all have defaults; its docstring is the help.
    """
    prog = f"lmx {command} RECIPE"
    if not argv or argv[0].startswith("-"):
        # Prints the help and ends; anything else is a missing recipe.
        tyro.cli(options, prog=prog, args=["--help"] if set(argv) & {"-h", "--help"} else [], config=CONFIG)
        raise UserError(f"the first argument is the recipe, as in: lmx {command} configs/quickstart.py")
    layout, (text, *rest) = take_layout(argv)
    default = _call(text)
    default = default.laid_out(layout) if layout else default
    fields: Any = [LAYOUT, ("experiment", Annotated[type(default), tyro.conf.arg(name="")], field(default=default))]
    combined = dataclasses.make_dataclass("Arguments", fields, bases=(options,), frozen=True)
    parsed: Any = tyro.cli(combined, prog=prog, args=rest, description=options.__doc__, config=CONFIG)
    own = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(cast(Any, options))}
    return options(**own), Recipe(recipe_name(text), parsed.experiment)


@dataclass(frozen=True)
class Placement:
    """Where a model shall lie, as ``--layout``, ``--mesh.AXIS`` and ``--rules.AXIS`` say; None for what none of them
    does: one device, and the model's own rules."""

    mesh: MeshConfig | None
    rules: Rules | None


def parse_placed(
    command: str, options: type[Options], argv: Sequence[str], own: Placement = Placement(None, None)
) -> tuple[Options, Placement]:
    """Reads the options of a command that works with a model on a mesh, and where that shall lie; by default, as
    ``own`` says."""
    layout, rest = take_layout(argv)
    start = find_layout(layout) if layout else Layout("", own.mesh or ONE, own.rules or Rules())
    fields: Any = [
        LAYOUT,
        ("mesh", MeshConfig, field(default=start.mesh)),
        ("rules", Rules, field(default=start.rules)),
    ]
    combined = dataclasses.make_dataclass("Arguments", fields, bases=(options,), frozen=True)
    config = (*CONFIG, tyro.conf.PositionalRequiredArgs)
    parsed: Any = tyro.cli(combined, prog=f"lmx {command}", args=rest, description=options.__doc__, config=config)
    chosen = options(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(cast(Any, options))})
    mesh = own.mesh if parsed.mesh == ONE else parsed.mesh
    return chosen, Placement(mesh, parsed.rules if layout or parsed.rules != start.rules else own.rules)


def take_layout(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The value of ``--layout``, or "", and the other arguments: those override what it sets, wherever they stand.

    Raises:
      UserError: there is no such layout.
    """
    names = [arg.partition("=")[0] for arg in argv]
    if "--layout" not in names:
        return "", list(argv)
    at = names.index("--layout")
    name, given, value = argv[at].partition("=")
    rest = [*argv[:at], *argv[at + (1 if given else 2) :]]
    name = value if given else (argv[at + 1] if at + 1 < len(argv) else "")
    find_layout(name)
    return name, rest


def recipe_name(text: str) -> str:
    """The function's name, which is the file's unless one is given."""
    path, _, function = text.partition(":")
    return function or Path(path).stem


def _call(text: str) -> Experiment:
    experiment = call_file(text, Experiment, "recipe")
    try:
        return typed(experiment)
    except UserError as error:
        raise UserError(f"the recipe {text} is ill-typed: {error}") from error


def call_file(text: str, expected: type[Returned], what: str) -> Returned:
    """What a function of a Python file returns: ``file.py`` (the function named like the file) or ``file.py:function``.

    Raises:
      UserError: there is no such file or function, it raises, or it returns something else; ``what`` it should be.
    """
    path, name = Path(text.partition(":")[0]), recipe_name(text)
    module = _import(path, what)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise UserError(f"{path} has no {what} function {name!r}; it has {nearest(name, known) or 'none'}")
    try:
        returned = function()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"the {what} {text} raised {type(error).__name__}: {error}") from error
    if not isinstance(returned, expected):
        raise UserError(f"the {what} {text} returned {type(returned).__name__}, expected an lmx.{expected.__name__}")
    return returned


def _import(path: Path, what: str) -> ModuleType:
    if path.suffix != ".py" or not path.is_file():
        raise UserError(
            f"there is no {what} file {path}; give a Python file, as configs/quickstart.py, or file.py:function"
        )
    name = f"lmx_recipe_{path.stem}"
    spec = cast(Any, importlib.util.spec_from_file_location(name, path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of a recipe look themselves up there
    sys.path.insert(0, str(path.resolve().parent))  # a recipe may derive from another beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"the {what} file {path} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module
