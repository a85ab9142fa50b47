"""What the preflight says of processes that differ; real ones are in tests/train/test_processes.py."""

import json
import time
from typing import Any

import jax
import pytest

from lmx.errors import UserError
from lmx.sharding import preflight as module
from lmx.sharding.preflight import preflight, require_same


def test_the_hosts_that_differ_are_named() -> None:
    told = [{"jax": "0.10.2"}, {"jax": "0.10.1"}, {"jax": "0.10.2"}]
    with pytest.raises(UserError, match=r'^jax is "0.10.1" on process 1 \(b\), but "0.10.2" on process 0 \(a\) and th'):
        require_same(told, ["a", "b", "c"], "install the same")


def test_of_two_that_differ_the_second_is_odd() -> None:
    with pytest.raises(UserError, match=r"local devices is 7 on process 1 \(b\), but 8 on process 0 \(a\); look$"):
        require_same([{"local devices": 8}, {"local devices": 7}], ["a", "b"], "look")


def test_what_one_lacks_is_a_difference() -> None:
    with pytest.raises(UserError, match="x is null on process 1"):
        require_same([{"x": 1}, {}], ["a", "b"], "")


def test_the_same_is_fine() -> None:
    require_same([{"x": [1]}, {"x": [1]}], ["a", "b"], "")


def test_a_clock_that_is_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(text: str, seconds: float) -> tuple[str, ...]:
        return (text, text, repr(float(text) + 60) if text else "")

    monkeypatch.setattr(module, "share", told)
    with pytest.raises(UserError, match=r"the clock of process 2 \(c\) is \+60 s from the others'"):
        module._check_clocks(["a", "b", "c"], 1)


def test_one_process_passes_alone(tmp_path: Any) -> None:
    began = time.monotonic()
    report = preflight([str(tmp_path)], {"seed": 1}, 5)
    assert time.monotonic() - began < 30
    assert len(report.processes) == 1
    assert report.devices == jax.device_count()
    assert not list(tmp_path.iterdir())
    json.dumps(report.data())


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        preflight([str(tmp_path / "file" / "below")], {}, 5)
