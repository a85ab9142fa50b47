"""Results of lmx eval side by side."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmx.cli.main import main
from lmx.errors import UserError
from lmx.report.results import compared, read_results, write_results


def result(path: Path, accuracy: float, stderr: float | None = 0.03, **more: Any) -> Path:
    measure = {"value": accuracy, "stderr": stderr, "method": "s / sqrt(n)", "n": 50, "higher_is_better": True}
    task = {
        "n": 50,
        "measures": {"accuracy": measure},
        "configuration": {"shots": len(path.stem)},
        "notes": {"a": "<b>"},
    }
    content = {"model": path.stem, "step": 3, "command": ["lmx", "eval", "a b"], "tasks": {"quiz": task}, **more}
    path.write_text(json.dumps(content))
    return path


def test_differences_have_the_error_of_independent_samples(tmp_path: Path) -> None:
    files = [result(tmp_path / "one.json", 0.5), result(tmp_path / "three.json", 0.7, 0.04)]
    (row,) = compared(read_results(files))
    assert (row["task"], row["measure"]) == ("quiz", "accuracy")
    first, second = row["results"]
    assert "difference" not in first
    assert second["difference"] == pytest.approx(0.2)
    assert second["difference_stderr"] == pytest.approx(0.05)


def test_the_page_has_a_table_a_plot_and_what_differs(tmp_path: Path) -> None:
    files = [result(tmp_path / "one.json", 0.5), result(tmp_path / "three.json", 0.7, 0.04)]
    plain = {"model": "m", "loss": 2.5, "targets": 9, "bits_per_byte": 1.5, "pair_accuracy": 0.75, "f1": None}
    (tmp_path / "whole.json").write_text(json.dumps(plain))
    page = write_results(read_results([*files, tmp_path / "whole.json"]), tmp_path / "out" / "page.html").read_text()
    assert "0.5 &plusmn; 0.03" in page
    assert "<b>+0.2 &plusmn; 0.05 better</b>" in page
    assert page.count("<svg") == 4  # accuracy, loss, bits per byte, pair accuracy
    assert "tasks.quiz.shots" in page
    assert "lmx eval &#x27;a b&#x27;" in page
    assert "<b>a" not in page.replace("<b>one", "")
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_scores_with_errors_stand_beside_those_of_older_files(tmp_path: Path) -> None:
    measure = {"value": 2.25, "stderr": 0.01, "method": "bootstrap", "n": 40, "higher_is_better": False}
    task = {"n": 40, "measures": {"loss": measure}, "configuration": {}, "notes": {}}
    (tmp_path / "new.json").write_text(json.dumps({"loss": 2.25, "targets": 900, "tasks": {"held-out text": task}}))
    (tmp_path / "old.json").write_text(json.dumps({"loss": 2.5, "targets": 800}))
    (row,) = compared(read_results([tmp_path / "new.json", tmp_path / "old.json"]))
    assert [(cell["stderr"], cell["n"]) for cell in row["results"]] == [(0.01, 40), (None, 800)]
    assert row["results"][1]["difference"] == pytest.approx(0.25)


def test_the_command_compares_json_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = [str(result(tmp_path / f"{name}.json", 0.5, None)) for name in ("one", "two")]
    assert main(["report", *files, "--out", str(tmp_path / "page.html"), "--json", "-"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["report"] == str(tmp_path / "page.html")
    assert told["measures"][0]["results"][1]["difference_stderr"] is None
    (tmp_path / "bad.json").write_text("[1]")
    assert main(["report", files[0], str(tmp_path / "bad.json")]) == 2
    assert "bad.json is no result of lmx eval" in capfd.readouterr().err


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a result"):
        read_results([tmp_path / "nowhere.json"])
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="cannot be read as a result"):
        read_results([tmp_path / "run"])
