"""The parent of training processes: an end of any kind becomes one status, in time, and the job may start again.

A process that the runtime aborts can neither clean up nor choose its exit code, and a stopped one never ends. So each
is a child of a parent that computes nothing. Children tell it, through a pipe, that they live, that they have joined
the others, and where their checkpoints are.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from lmx.errors import EXIT_DONE, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR

PIPE = "LMX_SUPERVISOR_PIPE"
BEATS = 4
"""Signs of life in a heartbeat's time."""
GRACE = 5.0
"""Seconds that the other processes have to say what they know when one has failed."""
PAUSE = 1.0
"""Seconds before a job starts again."""
AGAIN = 1.0
"""A signal so much later than the first is a second one, which ends everything at once."""
FINAL = frozenset([EXIT_DONE, EXIT_USER_ERROR, EXIT_INTERRUPTED, 130])
"""Exit codes that starting again would not change, or should not."""


@dataclass(frozen=True)
class Limits:
    """Attributes: how often a failed job starts again; seconds that processes have to find each other; seconds of
    silence after which a process counts as hung."""

    restarts: int
    start_seconds: float
    heartbeat_seconds: float


@dataclass(frozen=True)
class Command:
    """A process to start. ``name`` stands before each of its lines; without one they are passed on as they are."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    name: str = ""


@dataclass
class Child:
    """A running command, and what it has told."""

    command: Command
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)
    heard: float | None = None
    joined: bool = False
    checkpoints: str = ""
    hung: bool = False
    ended: float | None = None
    reader: threading.Thread | None = None

    def poll(self, heartbeat_seconds: float) -> bool:
        """Whether it has ended; one that has been silent for too long is killed."""
        if self.silence() > heartbeat_seconds and self.process.poll() is None:
            self.kill()
            self.hung = True
        if self.process.poll() is not None and self.ended is None:
            self.ended = time.monotonic()
        return self.ended is not None

    def silence(self) -> float:
        """Seconds since its last sign of life; 0 before the first."""
        return 0.0 if self.heard is None else time.monotonic() - self.heard

    def kill(self) -> None:
        """Ends it at once."""
        self.process.kill()
        self.process.wait()

    @property
    def code(self) -> int:
        """Its exit code; negative where a signal ended it."""
        return int(self.process.returncode)

    def told(self) -> str:
        """How it ended."""
        who = self.command.name or "the process"
        if self.hung:
            return f"{who} gave no sign of life and was killed"
        if self.code < 0:
            return f"{who} was ended by {signal.Signals(-self.code).name}"
        return f"{who} ended with exit code {self.code}"

    def has_checkpoint(self) -> bool:
        """Whether there is a whole checkpoint to go on from."""
        if not self.checkpoints:
            return False
        from etils import epath

        return any(epath.Path(self.checkpoints).glob("*/manifest.json"))


class Supervisor:
    """Runs commands as one job, once or again and again.

    Args:
      limits: of the job.
      say: is told when a process has failed, and what follows.
      output: where the lines of commands with names go; standard output by default.
    """

    def __init__(self, limits: Limits, say: Callable[[str], None], output: IO[bytes] | None = None):
        self._limits, self._say = limits, say
        self._output = output or sys.stdout.buffer
        self.children: list[Child] = []
        self._asked: float | None = None

    def run(self, commands: Callable[[], Sequence[Command]]) -> int:
        """Runs the commands, made anew for each attempt, to their end, and passes signals on to them.

        Returns:
          0 when all succeeded; 2 or 75 when they say so; 75 when one died or hung and there is a checkpoint to go on
          from; otherwise 1.
        """
        before = {s: signal.signal(s, self._pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self.attempts(commands)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def attempts(self, commands: Callable[[], Sequence[Command]]) -> int:
        """The same without signals, for a thread that is not the main one."""
        left, deadline = self._limits.restarts, None
        while True:
            cause = self._attempt(commands())
            if cause is None:
                return EXIT_DONE
            status, joined = self._status(cause), any(c.joined for c in self.children)
            if (status in FINAL and cause.code == status) or self._asked is not None:
                return status
            if deadline is None or joined:
                left, deadline = left - 1, time.monotonic() + self._limits.start_seconds
            again = left >= 0 and time.monotonic() < deadline
            rest = f"starting again, {left} restarts left" if again else f"exit code {status}"
            self._say(f"{cause.told()}; {rest}")
            if not again:
                return status
            time.sleep(PAUSE)

    def end(self) -> None:
        """Ends the job at once; it does not start again."""
        self._asked = time.monotonic()
        for child in self.children:
            child.kill()

    def _attempt(self, commands: Sequence[Command]) -> Child | None:
        """Runs each command once; the one that the others fell with, or None."""
        self.children = [start(command, self._output) for command in commands]
        limits, failed = self._limits, None
        try:
            while sum(c.poll(limits.heartbeat_seconds) for c in self.children) < len(commands):
                failed = failed or next((c.ended for c in self.children if c.ended and c.code), None)
                done = next((c.ended for c in self.children if c.ended), None)
                if (failed and time.monotonic() - failed > self._grace()) or (
                    done and time.monotonic() - done > limits.heartbeat_seconds + GRACE
                ):
                    break
                time.sleep(0.05)
        finally:
            late = [c for c in self.children if not c.poll(limits.heartbeat_seconds)]
            for child in late:
                child.hung = child.silence() > limits.heartbeat_seconds / 2
                child.kill()
            for child in self.children:
                if child.reader:
                    child.reader.join(GRACE)
        return _cause([c for c in self.children if c.hung or (c not in late and c.code)] or late)

    def _grace(self) -> float:
        """All save together when one is interrupted; they fail together within little time."""
        saving = all(c.code in FINAL for c in self.children if c.ended)
        return self._limits.heartbeat_seconds + GRACE if saving else GRACE

    def _status(self, cause: Child) -> int:
        if cause.code >= 0 and not cause.hung:
            return cause.code
        return EXIT_INTERRUPTED if any(c.has_checkpoint() for c in self.children) else EXIT_FAILURE

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        again = self._asked is not None and time.monotonic() - self._asked > AGAIN
        self._asked = self._asked or time.monotonic()
        for child in self.children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGKILL if again else number)


def start(command: Command, out: IO[bytes]) -> Child:
    """Starts a command in a session of its own (signals come from the parent), with a pipe to the parent."""
    reader, writer = os.pipe()
    output = subprocess.PIPE if command.name else None
    process = subprocess.Popen(
        list(command.arguments),
        env={**command.environment, PIPE: str(writer)},
        stdout=output,
        stderr=subprocess.STDOUT if command.name else None,
        pass_fds=[writer],
        start_new_session=True,
    )
    os.close(writer)
    child = Child(command, process)
    threading.Thread(target=_listen, args=(child, os.fdopen(reader, "rb")), daemon=True).start()
    if process.stdout is not None:
        child.reader = threading.Thread(target=_print_lines, args=(command.name, process.stdout, out), daemon=True)
        child.reader.start()
    return child


def _cause(failed: Sequence[Child]) -> Child | None:
    """Whom the others fell with: one that hung, that a signal ended, that the runtime aborted, or the first to fail."""
    if not failed:
        return None

    def rank(child: Child) -> tuple[bool, bool, bool, float]:
        return not child.hung, child.code >= 0, child.code == -signal.SIGABRT, child.ended or 0.0

    return min(failed, key=rank)


def _listen(child: Child, pipe: IO[bytes]) -> None:
    with pipe:
        for line in pipe:
            child.heard = time.monotonic()
            news = json.loads(line)
            child.joined |= "joined" in news
            child.checkpoints = news.get("checkpoints", child.checkpoints)


def _print_lines(name: str, stream: IO[bytes], out: IO[bytes]) -> None:
    for line in stream:
        out.write(f"[{name}] ".encode() + line)
        out.flush()


def is_supervised() -> bool:
    """Whether this process is a child of a supervisor."""
    return PIPE in os.environ


def tell(**news: Any) -> None:
    """Tells the supervisor, if any: ``joined=True``, ``checkpoints=DIRECTORY``, or nothing but a sign of life."""
    if is_supervised():
        os.write(int(os.environ[PIPE]), (json.dumps(news) + "\n").encode())


def beat(heartbeat_seconds: float) -> None:
    """Starts giving signs of life. If the supervisor is gone, this process is asked to save and end."""
    if is_supervised():
        os.set_inheritable(int(os.environ[PIPE]), False)
        threading.Thread(target=_beat, args=(heartbeat_seconds / BEATS,), name="lmx-beat", daemon=True).start()


def _beat(seconds: float) -> None:
    try:
        while True:
            tell()
            time.sleep(seconds)
    except BrokenPipeError:
        os.kill(os.getpid(), signal.SIGTERM)


def own_command(arguments: Sequence[str]) -> Command:
    """This command line as a child."""
    packages = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
    return Command([sys.executable, "-m", "lmx.cli.main", *arguments], {**os.environ, "PYTHONPATH": path})
