import json
import math

import pytest

from lmx.errors import UserError
from lmx.report.runs import read_run


def write(directory, *lines):
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    return directory


def test_reads_each_number_as_a_series_over_steps(tmp_path):
    rows = [{"step": s, "loss": 1 / s, "finished": False, "note": "x"} for s in (1, 2, 3)]
    rows.append({"step": 3, "eval_loss": 0.5})
    run = read_run(write(tmp_path, *map(json.dumps, rows)))
    assert set(run.series) == {"loss", "eval_loss"}
    assert run.series["loss"].steps.tolist() == [1, 2, 3]
    assert run.series["eval_loss"].steps.tolist() == [3]
    assert run.configuration == {}
    assert run.samples == ()


@pytest.mark.parametrize("unknown", ["NaN", "null"])
def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path, unknown):
    run = read_run(write(tmp_path, f'{{"step": 1, "loss": {unknown}}}', '{"step": 2, "lo'))
    assert run.series["loss"].steps.tolist() == [1]
    assert math.isnan(run.series["loss"].values[0])


def test_a_step_that_was_logged_twice_counts_as_logged_last(tmp_path):
    run = read_run(write(tmp_path, '{"step": 2, "loss": 9}', '{"step": 1, "loss": 4}', '{"step": 2, "loss": 3}'))
    assert run.series["loss"].values.tolist() == [4, 3]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{", '{"step": 2, "loss": 1}'], "line 1 of .* is not a JSON object"),
        (["[1]", '{"step": 2, "loss": 1}'], "line 1 of .* is not a JSON object"),
        ([""], "has no logged step"),
        (['{"step": 1}'], "has no logged step"),
    ],
)
def test_damage_and_emptiness_are_named(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_run(write(tmp_path, *lines))


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere has no metrics\.jsonl"):
        read_run(tmp_path / "nowhere")
    (write(tmp_path, '{"step": 1, "loss": 1}') / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.json is not a JSON object"):
        read_run(tmp_path)
