"""Recipes and command lines: ``path/to/file.py`` or ``path/to/file.py:function``, and typed dotted overrides."""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar, cast

import tyro

from lmx.config import nearest
from lmx.errors import UserError
from lmx.experiment import Experiment

Options = TypeVar("Options")


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


CONFIG = (tyro.conf.FlagConversionOff,)


def parse(command: str, options: type[Options], argv: Sequence[str]) -> tuple[Options, Recipe]:
    """Reads ``RECIPE [options] [overrides]``: one parser for the command's options and the recipe's fields.

    ``options`` is a frozen dataclass whose fields all have defaults; its docstring is the help.
    """
    prog = f"lmx {command} RECIPE"
    if not argv or argv[0].startswith("-"):
        # Prints the help and ends; anything else is a missing recipe.
        tyro.cli(options, prog=prog, args=["--help"] if set(argv) & {"-h", "--help"} else [], config=CONFIG)
        raise UserError(f"the first argument is the recipe, as in: lmx {command} configs/quickstart.py")
    text, *rest = argv
    default = _call(text)
    fields: Any = [("experiment", Annotated[type(default), tyro.conf.arg(name="")], field(default=default))]
    combined = dataclasses.make_dataclass("Arguments", fields, bases=(options,), frozen=True)
    parsed: Any = tyro.cli(combined, prog=prog, args=rest, description=options.__doc__, config=CONFIG)
    own = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(cast(Any, options))}
    return options(**own), Recipe(recipe_name(text), parsed.experiment)


def recipe_name(text: str) -> str:
    """The function's name, which is the file's unless one is given."""
    path, _, function = text.partition(":")
    return function or Path(path).stem


def print_result(result: dict[str, Any], people: str, file: str) -> None:
    """Prints what is for people, and the same as JSON to ``file``; "-" is standard output and then prints only that."""
    if file == "-":
        print(json.dumps(result, indent=2))
        return
    print(people)
    if file:
        Path(file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _call(text: str) -> Experiment:
    path, name = Path(text.partition(":")[0]), recipe_name(text)
    module = _import(path)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise UserError(f"{path} has no recipe function {name!r}; it has {nearest(name, known) or 'none'}")
    try:
        experiment = function()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the recipe {text} raised {type(error).__name__}: {error}") from error
    if not isinstance(experiment, Experiment):
        raise UserError(f"the recipe {text} returned {type(experiment).__name__}, expected an lmx.Experiment")
    return experiment


def _import(path: Path) -> ModuleType:
    if path.suffix != ".py" or not path.is_file():
        raise UserError(
            f"there is no recipe file {path}; give a Python file, as configs/quickstart.py, or file.py:function"
        )
    name = f"lmx_recipe_{path.stem}"
    spec = cast(Any, importlib.util.spec_from_file_location(name, path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of a recipe look themselves up there
    sys.path.insert(0, str(path.resolve().parent))  # a recipe may derive from another beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"the recipe file {path} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module
