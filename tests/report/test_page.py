import json
from html.parser import HTMLParser

import pytest

from lmx.cli.report import main
from lmx.errors import UserError
from lmx.report.page import write_report

EVIL = "<script>alert('&')</script>"
VOID = {"meta", "path", "use", "br", "rect"}


class Page(HTMLParser):
    """Collects text, and checks that what opens also closes and that nothing is fetched from elsewhere."""

    def __init__(self, file):
        super().__init__()
        self.text, self.open, self.fetched = "", [], []
        self.feed(file.read_text(encoding="utf-8"))
        assert not self.open
        assert not self.fetched

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        links = [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        self.fetched += links + [tag] * (tag in ("script", "link", "img", "iframe"))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def make_run(directory, learning_rate=1e-3):
    directory.mkdir(parents=True)
    rows = [{"step": s, "loss": 5 / s, "tokens_per_second": 10.0, "skipped": 0} for s in range(1, 200)]
    rows[99] |= {"eval_loss": 1.25, "eval_bits_per_byte": 0.5}
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"type": "LocalFiles", "name": EVIL}
    optimizer = {"type": "AdamW", "learning_rate": learning_rate, "betas": [0.9, 0.95]}
    experiment = {"type": "Experiment", "optimizer": optimizer, "data": {"type": "Data", "sources": [source]}}
    (directory / "experiment.json").write_text(json.dumps(experiment))
    (directory / "data.json").write_text(json.dumps({"train": {"documents": 1742}, EVIL: EVIL}))
    (directory / "summary.json").write_text(json.dumps({"bits_per_byte": 1.2345, "note": EVIL}))
    (directory / "fingerprint.json").write_text(json.dumps({"jax": "0.10.2", "cores": 2}))
    samples = [{"step": s, "prompt": EVIL, "text": f"{EVIL} text {s}."} for s in range(10, 200, 10)]
    (directory / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    return directory


def test_one_run_shows_everything_escaped_and_alone(tmp_path):
    run = make_run(tmp_path / "first")
    page = write_report([run])
    assert page == run / "report.html"
    text = Page(page).text
    assert "Always the same: skipped 0." in text
    for part in ("1.234", "1,742", "AdamW", "0.9, 0.95", "0.10.2", "held-out", "text 10.", "text 190.", EVIL):
        assert part in text
    assert EVIL not in page.read_text()


def test_only_metrics_is_needed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}')
    text = Page(write_report([tmp_path], tmp_path / "deep" / "page.html")).text
    assert "2.5" in text
    assert "Configuration" not in text


def test_several_runs_show_what_differs_first(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 6e-4)]
    page = write_report(runs)
    assert page == tmp_path / "report.html"
    text = Page(page).text
    differences = text[text.index("Differences in configuration") : text.index("Curves")]
    assert "optimizer.learning_rate" in differences
    assert "0.0006" in differences
    assert "betas" not in differences


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")]
    text = Page(write_report(runs)).text
    assert str(runs[0]) in text
    assert "None: the configurations are the same" in text


def test_no_run_at_all_is_the_user_s_mistake():
    with pytest.raises(UserError, match="at least one run"):
        write_report([])


def test_the_command_prints_the_path(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    main([str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    main([str(run), "--out", str(tmp_path / "p.html"), "--json", "-"])
    assert json.loads(capsys.readouterr().out) == {
        "report": str(tmp_path / "p.html"),
        "runs": [str(run)],
        "goodput": {str(run): None},
    }


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "lmx report runs/quickstart" in " ".join(capsys.readouterr().out.split())
