"""When a run cannot write its own files: its state is saved, and it ends with one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from lmx.errors import LmxError
from lmx.sharding.processes import agreed
from lmx.train.signals import StopSignal


class Outage:
    """Notes the first write that failed and asks the run to save and leave, as a signal does.

    Args:
      stop: is asked.
    """

    def __init__(self, stop: StopSignal):
        self._stop = stop
        self._error: OSError | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Around a write to the run's own files: an OSError does not leave the block."""
        try:
            yield
        except OSError as error:
            self._error = self._error or error
            self._stop.leave("a file that cannot be written")

    def end(self, done: int) -> None:
        """Raises LmxError, on every process, if a write failed on any; ``done`` steps are in a checkpoint."""
        with agreed():
            if self._error is not None:
                raise LmxError(
                    f"{self._error.filename or 'the output'} could not be written: {self._error.strerror}; the run was "
                    f"saved after step {done}: make room and run the same command again to go on"
                ) from self._error
