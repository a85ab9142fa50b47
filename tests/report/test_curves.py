import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from lmx.errors import UserError
from lmx.report import curves
from lmx.report.runs import Run, Series


def run(**series):
    made = {k: Series(np.arange(1, len(v) + 1), np.asarray(v, float)) for k, v in series.items()}
    return Run("r", made, {}, {}, {}, {}, ())


def test_smooth_is_the_mean_of_what_is_finite_around():
    values = np.arange(150.0)
    values[75] = np.nan
    mean, width = curves.smooth(values)
    assert width == 3
    assert mean[10] == pytest.approx(10)
    assert mean[0] == pytest.approx(0.5)
    assert mean[75] == pytest.approx(75)
    assert np.isnan(curves.smooth(np.full(4, np.nan))[0]).all()


def test_thin_keeps_peaks_and_ends_small():
    values = np.zeros(100_000)
    values[54_321], values[77_777] = 9.0, -9.0
    line = curves.thin(Series(np.arange(100_000), values))
    assert len(line.steps) <= 1200
    assert 54_321 in line.steps
    assert 77_777 in line.steps
    few = Series(np.arange(1000), values[:1000])
    assert curves.thin(few) is few


def test_known_panels_first_then_any_other_number():
    runs = [run(zebra=[1, 2], eval_loss=[1]), run(step_seconds=[1], router_loss=[1, np.nan])]
    assert [p.key for p in curves.panels(runs)] == ["loss", "step_seconds", "router_loss", "zebra"]
    assert curves.constants(runs) == {}


def test_numbers_that_never_change_have_no_panel():
    runs = [run(loss=[2, 2], skipped=[0, 0], targets=[512, 512], eval_seconds=[3]), run(skipped=[0], targets=[256])]
    assert [p.key for p in curves.panels(runs)] == ["loss", "targets"]  # known ones do, and what tells runs apart
    assert curves.constants(runs) == {"eval_seconds": 3.0, "skipped": 0.0}
    assert curves.constants(runs[:1]) == {"eval_seconds": 3.0, "skipped": 0.0, "targets": 512.0}


@pytest.mark.parametrize("values", [[3.0], [3.0, 2.0], [np.nan] * 3, list(9 / np.arange(1, 500)), [1e-9, 1e9, 0.0]])
def test_draws_whatever_was_logged(values):
    for panel in curves.PANELS:
        svg = curves.draw(panel, [run(**{panel.key: values}), run(other=values)])
        root = ElementTree.fromstring(svg)
        assert "step" in "".join(root.itertext())
        assert panel.unit in "".join(root.itertext())


def test_colours_are_the_page_s_own():
    svg = curves.draw(curves.PANELS[0], [run(loss=[3.0, 2.0], eval_loss=[3.0, 2.0])])
    assert "var(--ink)" in svg
    assert "var(--card)" in svg
    assert curves.color(0) in svg
    assert not any(stand_in in svg for stand_in in ("#010203", "#040506", "#070809"))


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'lmx\[report\]'"):
        curves.draw(curves.PANELS[0], [run(loss=[1.0])])
