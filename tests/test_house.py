"""Lint, format, types and import contracts: the rules that tools keep, run with the tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        [BIN / "ruff", "check", "."],
        [BIN / "ruff", "format", "--check", "."],
        [sys.executable, "-m", "mypy"],
        [BIN / "lint-imports"],
    ],
    ids=["lint", "format", "types", "import-contracts"],
)
def test_tool_finds_nothing(command):
    result = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
