"""Ctrl-C and SIGTERM: finish the step, save, leave; a second one leaves at once."""

import signal
from types import FrameType, TracebackType

from lmx.errors import Interrupted

HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Within its block, the first signal is noted while ``graceful`` is set, and raises Interrupted otherwise."""

    def __init__(self) -> None:
        self.graceful = False
        self.received: str | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.signal(s, self._handle) for s in HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, signal.Signals(number).name
        if again or not self.graceful:
            raise Interrupted(f"stopped by {self.received}; run the same command again to go on")
