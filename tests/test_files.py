"""Files that appear whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmx import config, files
from lmx.adapters.base import write_base
from lmx.errors import UserError
from lmx.experiment import Experiment, RunDir
from lmx.train.fingerprint import compare
from lmx.train.metrics import cut_back

WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: files.write_durably(path, "new"),
    "json": lambda path: files.write_json(path, {"new": 1}),
    "experiment": lambda path: config.save(Experiment(), path),
    "base": lambda path: write_base(path, "model", "new"),
    "log": lambda path: cut_back(path, 1),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Any]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "gone")))
    with pytest.raises(OSError, match="gone") as caught:
        write(path)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.fingerprint.write_text('{"lmx": "0.1')
    with pytest.raises(UserError, match=r"fingerprint\.json is damaged, expected JSON.*delete it"):
        compare(run, {"lmx": "0.1.0"})
