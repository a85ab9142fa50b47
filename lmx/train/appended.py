"""Files that grow by whole records, also when the disk is full for a moment."""

import errno
import os
import socket
import struct
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from lmx.files import naming


class Appended:
    """A file that grows by whole records: what cannot be written is kept, and tried again with the next record.

    Attributes:
      left: the bytes that could not be written yet.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)
        self.left = b""

    def add(self, record: bytes) -> None:
        """Writes what is left, and a record. Raises OSError, with the file's name, if they could not be written."""
        self.left += record
        end = self._file.seek(0, os.SEEK_END)
        with naming(self._path):
            if self._file.write(self.left) < len(self.left):
                self._file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left = b""

    def close(self) -> None:
        """Tries once more to write what is left; raises OSError, having closed the file, if that failed."""
        with self._file:
            self.add(b"")


class Scalars:
    """TensorBoard's curves: a file of TFRecords, written by the thread that logs.

    The writer of tensorboardX is a thread behind a queue. A write that fails ends the thread; then the queue fills up,
    and whoever logs waits for ever.

    Args:
      directory: where TensorBoard looks.
      purge_step: what other files there say of this step and those after it is hidden.
    """

    def __init__(self, directory: Path, purge_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = Appended(directory / name)
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: dict[str, float]) -> None:
        """The values of a step, each a point of the curve of its name."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=points)))

    def close(self) -> None:
        """See :meth:`Appended.close`."""
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.add(length + checks[0] + data + checks[1])
