"""Ctrl-C and SIGTERM: finish the step, save, leave; a second one leaves at once.

With several processes, JAX takes a SIGTERM to any of them for the notice that the job is preempted, and agrees on the
step after which all save; a handler of one's own would disable that.
"""

import os
import signal
from types import FrameType, TracebackType

from jax.experimental.multihost_utils import reached_preemption_sync_point

from lmx.errors import Interrupted
from lmx.sharding.processes import count
from lmx.train.supervise import is_supervised

HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Within its block, the first signal is noted while ``graceful`` is set, and raises Interrupted otherwise."""

    def __init__(self) -> None:
        self.graceful = False
        self.received: str | None = None
        self._left = False

    def __enter__(self) -> "StopSignal":
        handlers = dict.fromkeys(HANDLED, self._handle) if count() == 1 else {signal.SIGINT: self._pass_on}
        self._before = {s: signal.signal(s, handler) for s, handler in handlers.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def leave(self, reason: str) -> None:
        """Asks, once, for what a signal asks for."""
        if self._left:
            return
        self._left = True
        if count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the others
        else:
            self.received = reason

    def asks(self, done: int) -> bool:
        """Whether to save and leave after ``done`` steps; all processes ask after each step, and get one answer."""
        if count() > 1 and reached_preemption_sync_point(done):
            self.received = "a signal to this or another process"
        return self.received is not None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one leaves at once
        os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Of a supervised process the scheduler and the parent both tell it; the parent sees to a second Ctrl-C.
        again = self.received is not None and not is_supervised()
        self.received = signal.Signals(number).name
        if again or not self.graceful:
            raise Interrupted(f"stopped by {self.received}; run the same command again to go on")
