"""``lmx lr`` on a tiny recipe, in this process."""

import json

import jobs
import pytest

from lmx.cli.main import main


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    jobs.set_up(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_suggests_a_rate_and_draws_it(recipe, capsys):
    command = ["lr", "tiny.py", "--steps", "24", "--first", "1e-4", "--last", "10", "--smoothing", "0.5"]
    assert main([*command, "--page", "rates.html", "--json", "sweep.json"]) == 0
    said = capsys.readouterr().out
    sweep = json.loads((recipe / "sweep.json").read_text())
    assert f"suggested learning rate {sweep['suggested']:.2g}: a tenth of" in said
    assert sweep["suggested"] == pytest.approx(sweep["lowest"] / 10)
    assert len(sweep["rates"]) == len(sweep["losses"]) == len(sweep["smoothed"]) <= 23
    assert sweep["rates"] == sorted(sweep["rates"])
    page = (recipe / "rates.html").read_text()
    assert page.count("<svg") == 1
    assert "suggested" in page
    assert not (recipe / "runs").exists()


def test_a_bad_range_is_refused(recipe, capsys):
    assert main(["lr", "tiny.py", "--first", "1", "--last", "0.1"]) == 2
    assert "the rates go from 1.0 to 0.1" in capsys.readouterr().err


def test_the_optimizers_fields_are_options_and_unknown_ones_are_refused(recipe, capsys):
    with pytest.raises(SystemExit):
        main(["lr", "tiny.py", "--optimizer.momentun", "0.5"])
    assert "momentun" in capsys.readouterr().err
