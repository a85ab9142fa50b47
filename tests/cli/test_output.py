"""Files that a command is asked to write: a path that cannot be written is told before there is any work to lose."""

import json
import os
from pathlib import Path

import pytest

from lmx.cli.main import main
from lmx.cli.output import print_result
from lmx.errors import UserError
from lmx.files import check_reachable

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.py")
COMMANDS = [
    ["train", QUICKSTART],
    ["eval", "runs/none"],
    ["eval", "runs/none", "--tasks", "none.py"],
    ["generate", "runs/none", "--prompt", "a"],
    ["report", "runs/none"],
    ["inspect", "runs/none", "--text", "a"],
    ["lr", QUICKSTART],
    ["data", "stats", QUICKSTART],
    ["check", "mesh", QUICKSTART],
    ["check", "faults"],
    ["check", "cluster"],
    ["plan", QUICKSTART],
    ["model", QUICKSTART],
    ["convert", "runs/none", "exported", "--to", "hf"],
    ["bench", "train", QUICKSTART],
    ["bench", "decode", QUICKSTART],
    ["bench", "load", "llama_3_2_1b"],
]
FILES = [(command, "--json") for command in COMMANDS]
PAGES = [
    (["report", "runs/none"], "--out"),
    (["inspect", "runs/none", "--text", "a"], "--out"),
    (["lr", QUICKSTART], "--page"),
]


@pytest.mark.parametrize(
    ("command", "option"),
    [*FILES, *PAGES],
    ids=lambda value: " ".join([value] if isinstance(value, str) else [w for w in value if os.sep not in w]),
)
def test_every_command_refuses_a_directory_for_a_file(
    command: list[str], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, option, str(tmp_path)]) == 2
    assert capfd.readouterr().err == f"lmx {command[0]}: {tmp_path} is a directory, expected the file to write\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "option"), PAGES, ids=["report", "inspect", "lr"])
def test_a_page_needs_a_file(command: list[str], option: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*command, option, "-"]) == 2
    says = f"lmx {command[0]}: a page does not go to standard output; name the file to write\n"
    assert capfd.readouterr().err == says


def test_what_stands_in_the_way_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes"
    file.write_text("kept")
    assert main(["model", QUICKSTART, "--json", str(file / "a" / "b.json")]) == 2
    assert f"{file}/a/b.json cannot be written: {file} is no directory; choose another path" in capfd.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # nothing is forbidden to root
    with pytest.raises(UserError, match=f"the page cannot be written: you may not write to {tmp_path}; choose"):
        check_reachable(tmp_path / "a" / "b", "the page")
    check_reachable("gs://bucket/notes")
    assert file.read_text() == "kept"


def test_directories_that_are_missing_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a" / "b" / "found.json"
    check_reachable(file)
    print_result({"loss": float("nan")}, "for people", str(file))
    assert json.loads(file.read_text()) == {"loss": None}
    assert capsys.readouterr().out == "for people\n"


def test_a_path_that_no_file_system_takes_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["model", QUICKSTART, "--json", "a" * 300]) == 2
    assert capfd.readouterr().err.endswith(": File name too long; give another path\n")
