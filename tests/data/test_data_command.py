import json
import sys
import types
from pathlib import Path

import pytest

from lmx.cli import data
from lmx.data.prepare import Prepared
from lmx.experiment import Experiment, TrainConfig


@pytest.fixture
def overrides(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reached the recipe as overrides."""
    seen: list[str] = []

    def load_recipe(text: str, overrides: list[str]) -> Experiment:
        assert text == "recipe.py"
        seen.extend(overrides)
        return Experiment(data=prepared.config)

    module = types.ModuleType("lmx.cli.recipes")
    module.load_recipe = load_recipe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lmx.cli.recipes", module)
    return seen


@pytest.mark.parametrize("action", ["prepare", "stats"])
def test_statistics_are_a_table_and_json(
    action: str, overrides: list[str], prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stats.json"
    arguments = [action, "recipe.py", "--length", "64", "--json", str(file), "--data.held-out", "0.1"]
    assert data.main(arguments) == 0
    assert overrides == ["--data.held-out", "0.1"]
    assert json.loads(file.read_text()) == prepared.stats(64)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("documents", "held out tokens", "dropped", "truncated", "padding"))
    assert prepared.fingerprint in printed


def test_json_to_standard_output_is_only_json(
    overrides: list[str], prepared: Prepared, capsys: pytest.CaptureFixture[str]
) -> None:
    length = TrainConfig().length
    assert data.main(["prepare", "recipe.py", "--json", "-"]) == 0
    plans = set((prepared.root / "plans").iterdir())
    assert json.loads(capsys.readouterr().out) == prepared.stats(length)
    assert set((prepared.root / "plans").iterdir()) == plans  # those of training and of held-out rows were there


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        data.main(["--help"])
    assert end.value.code == 0
    assert "lmx data stats configs/quickstart.py" in capsys.readouterr().out
