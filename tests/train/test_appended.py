"""Files that grow by whole records on a disk that is full for a moment."""

import errno
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from lmx.experiment import EvalConfig, RunDir
from lmx.train.appended import Appended
from lmx.train.evaluation import EarlyStopping
from lmx.train.metrics import MetricsLog, last_values


class Disk:
    """A file on a disk with so much room: first a part of a record is written, then nothing."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room and data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Any:
        return self.file.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)


def events(file: Path) -> Iterator[Event]:
    data = file.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        record, data = data[: size + 16], data[size + 16 :]
        checks = struct.unpack("<I", record[8:12]) + struct.unpack("<I", record[-4:])
        assert checks == (masked_crc32c(record[:8]), masked_crc32c(record[12:-4]))
        yield Event.FromString(record[12:-4])


def test_what_a_full_disk_refuses_is_written_later_and_never_in_part(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    file = Appended(path)
    file.add(b"one\n")
    file._file = disk = Disk(file._file, 2)  # type: ignore[assignment]
    for _ in range(2):  # a part of it is written and taken back; then there is no room at all
        with pytest.raises(OSError, match="No space left") as caught:
            file.add(b"two\n")
        assert caught.value.filename == str(path)
        assert path.read_bytes() == b"one\n"
    disk.room = 100
    file.add(b"three\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\ntwo\nthree\n"


def test_a_log_on_a_full_disk_says_so_at_once_and_loses_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = MetricsLog(run, 0)
    files = (log._lines, log._board._file)
    for file in files:
        file._file = Disk(file._file, 0)  # type: ignore[assignment]
    for step in range(1, 30):
        with pytest.raises(OSError, match="No space left"):
            log.write(step, {"loss": step / 2})
    unlogged = log.unlogged
    for file in files:
        file._file.room = 10**6  # type: ignore[attr-defined]
    log.close()
    assert len(run.metrics.read_text().splitlines()) == 29
    (board,) = (tmp_path / "tensorboard").iterdir()
    version, start, *points = events(board)
    assert (version.file_version, start.session_log.status, start.step) == ("brain.Event:2", 1, 1)
    assert [(p.step, v.tag, v.simple_value) for p in points for v in p.summary.value] == [
        (step, "loss", step / 2) for step in range(1, 30)
    ]
    MetricsLog(run, 29, unlogged).close()  # they were written after the checkpoint that keeps them
    assert len(run.metrics.read_text().splitlines()) == 29


def test_numbers_that_are_not_finite_are_null_to_every_parser(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = MetricsLog(run, 0)
    log.write(1, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.5})
    log.close()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    line = json.loads(run.metrics.read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.5}
    assert math.isnan(last_values(run.metrics)["loss"])


def test_a_first_evaluation_that_is_not_a_number_is_not_the_best() -> None:
    early = EarlyStopping(EvalConfig(every=1, patience=2))
    assert not early.stops(math.nan, 1)
    assert not early.stops(3.0, 2)
    assert (early.best, early.best_step) == (3.0, 2)
    assert not early.stops(4.0, 3)
    assert early.stops(math.nan, 4)
    assert str(early) == "2 evaluations in a row had no lower loss than the best (3.0000 after step 2)"
