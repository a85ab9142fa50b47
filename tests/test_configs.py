"""Each recipe opens with its exact command and the result to expect, and fits its model."""

import ast
from pathlib import Path

import pytest

from lmx.cli.recipes import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_has_its_command_and_what_to_expect(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    told = ast.get_docstring(tree) or ""
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    commands = [word for line in told.splitlines() if "lmx " in line for word in line.split()]
    for name in names:
        shown = (f"{file.name}:{name}", *([file.name] if name == file.stem else []))  # file.py is file.py:file
        assert any(word.endswith(shown) for word in commands), f"{name} has no command"
        load_recipe(f"{file}:{name}").check()
    assert "xpect" in told
