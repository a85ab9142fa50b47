"""The check of faults: a run that is killed, stopped and robbed of checkpoints ends as if nothing had happened."""

import itertools
import math
import random
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from etils import epath

from lmx.checkpoint import manifest
from lmx.checkpoint.loading import SAVING
from lmx.errors import EXIT_FAILURE, EXIT_INTERRUPTED, LmxError, UserError
from lmx.report.goodput import read_goodput
from lmx.train.differences import differences
from lmx.train.small_disk import SmallDisk
from lmx.train.supervise import GRACE
from lmx.train.victim import DISK, EVERY, HEARTBEAT, Attempt, Victim, set_up

Kind = Literal["SIGKILL", "SIGTERM", "SIGSTOP", "SIGINT", "full disk"]
Moment = Literal["starting", "training", "saving"]
Damage = Literal["", "truncate", "flip"]
FIRST = 3 * EVERY + 1
"""No fault before this step: by then there are two whole checkpoints, so that one may be damaged."""
START_UP = 4.0
"""A fault while starting comes within so many seconds."""
END_SECONDS = 2 * (HEARTBEAT + GRACE)
"""Within this time after a fault the job must have ended: silence is noticed, and then the others have to leave."""
UNNOTICED = 5 * EVERY
"""A job that takes so many steps after a fault did not notice it."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
      step: what must have been logged before it comes.
      kind: a signal to a random process, or a disk that has no room for the next checkpoint.
      moment: whether it waits until a checkpoint is being written, or comes before anything is trained.
      damage: what is then done to the newest whole checkpoint.
    """

    step: int
    kind: Kind = "SIGKILL"
    moment: Moment = "training"
    damage: Damage = ""


CYCLE = (
    Fault(0, moment="saving"),
    Fault(0, damage="truncate"),
    Fault(0, "SIGSTOP"),
    Fault(0, "SIGTERM"),
    Fault(0, moment="saving", damage="flip"),
    Fault(0, "full disk"),
    Fault(0, moment="starting"),
    Fault(0, "SIGINT"),
    Fault(0, "SIGSTOP", "saving"),
    Fault(0, "SIGTERM", "saving"),
)
"""Every kind of fault once."""


@dataclass(frozen=True)
class Outcome:
    """What became of a fault.

    Attributes:
      kind, moment: as asked.
      process: that was hit.
      step: the last one logged.
      exit_code: of the job.
      seconds: from the fault to the end of the job; on a full disk from its last step.
      damage: the file and what was done to it.
      expected: the newest good checkpoint that was left, 0 if none.
      resumed: the step that the next attempt went on from.
    """

    kind: Kind
    moment: Moment
    process: int
    step: int
    exit_code: int
    seconds: float
    damage: str
    expected: int
    resumed: int

    def problem(self) -> str | None:
        """What is wrong with it, or None."""
        code = EXIT_FAILURE if self.kind == "full disk" else EXIT_INTERRUPTED
        codes = (code, EXIT_FAILURE) if self.moment == "starting" else (code,)
        what = f"{self.kind} of process {self.process} after step {self.step}"
        if self.exit_code not in codes:
            return f"{what} gave exit code {self.exit_code}, expected {code}"
        if self.seconds > END_SECONDS:
            return f"{what}: the job ended {self.seconds:.0f} s later, expected within {END_SECONDS:.0f} s"
        if self.resumed != self.expected:
            return f"{what}: the run went on from step {self.resumed}; the newest good checkpoint was {self.expected}"
        return None


@dataclass(frozen=True)
class FaultCheck:
    """The faults in their order, and in what the two runs differ at the end.

    Attributes:
      steps, processes: of both runs.
      disk: how the disk was made full.
      outcomes: of the faults that came.
      missed: how many did not, because the run reached its end first.
      different: sentences.
      goodput: of the disturbed run, as lmx.report.goodput gives it.
      seconds: that all took.
    """

    steps: int
    processes: int
    disk: str
    outcomes: tuple[Outcome, ...]
    missed: int
    different: tuple[str, ...]
    goodput: dict[str, Any]
    seconds: float

    def problems(self) -> list[str]:
        """Everything that is not as it should be."""
        found = [*filter(None, (o.problem() for o in self.outcomes)), *self.different]
        if self.missed:
            asked, came = len(self.outcomes) + self.missed, len(self.outcomes)
            enough = math.ceil(self.steps * asked / max(came, 1))
            found.append(
                f"{self.missed} of {asked} faults did not come, because the run reached step {self.steps} first (steps "
                f"go on while a fault ends the job): about --steps {enough} has room for all"
            )
        return found

    def data(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {**asdict(self), "problems": self.problems(), "same": not self.problems()}

    def verdict(self) -> str:
        """One sentence."""
        if problems := self.problems():
            return "; ".join(problems)
        longest, job = max(o.seconds for o in self.outcomes), "process" if self.processes == 1 else "processes"
        return (
            f"after {len(self.outcomes)} faults in a job of {self.processes} {job} the parameters, the optimizer's "
            f"state and what was logged of all {self.steps} steps equal those of the undisturbed run bit for bit; the "
            f"job ended at most {longest:.1f} s after a fault; the full disk was {self.disk}; {self.seconds:.0f} s"
        )

    def verify(self) -> None:
        """Raises LmxError with the first problem, if there is one."""
        problems = self.problems()
        if problems:
            raise LmxError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))


def random_faults(count: int, steps: int, seed: int) -> tuple[Fault, ...]:
    """``count`` faults at random steps: those of :data:`CYCLE` again and again, shuffled.

    Raises:
      UserError: so many faults do not fit into so few steps.
    """
    rng, places = random.Random(seed), range(FIRST, steps - 2 * EVERY)
    if count < 1 or len(places) < count:
        raise UserError(
            f"--faults {count}, --steps {steps}: expected at least 1 fault and {FIRST + count + 2 * EVERY} steps"
        )
    kinds = list(itertools.islice(itertools.cycle(CYCLE), count))
    rng.shuffle(kinds)
    chosen = sorted(rng.sample(places, count))
    return tuple(replace(kind, step=step) for kind, step in zip(kinds, chosen, strict=True))


def check_faults(
    faults: Sequence[Fault],
    steps: int = 300,
    processes: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> FaultCheck:
    """Trains the same run twice, once in peace and once with ``faults``, and compares the two.

    Args:
      faults: in the order of their steps, which lie between :data:`FIRST` and ``steps - 2 * EVERY``.
      steps: of both runs.
      processes: of the job.
      seed: of the corpus, the moments and the damage.
      progress: is told what is about to happen.

    Raises:
      LmxError: a restart failed, or a run stands still.
    """
    began, wounds = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="lmx-faults-") as directory:
        root = Path(directory)
        set_up(root, seed)
        calm, victim = (Victim(root, name, steps, processes) for name in ("calm", "disturbed"))
        rng = random.Random(seed)
        with SmallDisk(root / DISK, victim.checkpoints) as disk:
            progress(f"{steps} steps undisturbed")
            _finish(calm, 0)
            for number, fault in enumerate(faults):
                progress(f"fault {number + 1} of {len(faults)}: {_told(fault)}, {steps} steps")
                wound = _wound(victim, number, fault, rng, disk)
                if wound is None:
                    break
                wounds.append(wound)
            else:
                progress("the last restart, to the end")
                _finish(victim, len(faults))
            outcomes = tuple(Outcome(**w, resumed=victim.resumed(i + 1)) for i, w in enumerate(wounds))
            different = tuple(differences(calm, victim))
            goodput = read_goodput(victim.run.path)
        spent = goodput.data() if goodput else {}
        missed = len(faults) - len(outcomes)
        return FaultCheck(steps, processes, disk.kind, outcomes, missed, different, spent, time.monotonic() - began)


def _told(fault: Fault) -> str:
    moment = "while starting" if fault.moment == "starting" else f"after step {fault.step}"
    return " ".join(
        filter(None, [fault.kind, moment, "while saving" if fault.moment == "saving" else "", fault.damage])
    )


def _finish(victim: Victim, number: int) -> None:
    with victim.attempt(number) as attempt:
        attempt.wait_for(lambda: attempt.step() == victim.steps, f"step {victim.steps}")
        code, _ = attempt.end(working=True)
        if code != 0:
            raise LmxError(f"the run ended with exit code {code}: {attempt.tail()}")


def _wound(victim: Victim, number: int, fault: Fault, rng: random.Random, disk: SmallDisk) -> dict[str, Any] | None:
    """Starts the run, lets the fault happen, and says what happened: an Outcome but for ``resumed``, or None, if the
    run came to its end before the fault, or too soon after it to notice."""
    process = rng.randrange(victim.processes)
    with victim.attempt(number) as attempt:
        _await_moment(victim, attempt, fault, rng)
        if attempt.finished():
            return None
        before = attempt.step()
        if fault.kind == "full disk":
            disk.fill()
        else:
            attempt.process(process).process.send_signal(signal.Signals[fault.kind])
        code, seconds = attempt.end(working=fault.kind == "full disk")  # it is noticed by a later save
        step = attempt.step()
    disk.free()
    if code == 0 and step - before < UNNOTICED:
        return None
    if code == 0:
        raise LmxError(f"{fault.kind} of process {process} after step {before} went unnoticed: the run came to its end")
    damage = _damage(victim.checkpoints, fault.damage, rng)
    good = (s for s in reversed(_whole(victim.checkpoints)) if _problem(victim.checkpoints, s) is None)
    return {
        "kind": fault.kind,
        "moment": fault.moment,
        "process": process,
        "step": step,
        "exit_code": code,
        "seconds": seconds,
        "damage": damage,
        "expected": next(good, 0),
    }


def _await_moment(victim: Victim, attempt: Attempt, fault: Fault, rng: random.Random) -> None:
    if fault.moment == "starting":
        time.sleep(rng.uniform(0, START_UP))
        return
    attempt.wait_for(lambda: attempt.step() >= fault.step or attempt.finished(), f"step {fault.step}")
    if fault.moment == "saving":
        saving = victim.checkpoints / SAVING
        attempt.wait_for(lambda: saving.exists() or attempt.finished(), "a checkpoint")
    time.sleep(rng.uniform(0, 0.02))


def _damage(directory: Path, kind: Damage, rng: random.Random) -> str:
    """Damages one file of the newest whole checkpoint; says which, and how."""
    if not kind:
        return ""
    step = _whole(directory)[-1]
    folder = directory / str(step)
    file = rng.choice(sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size))
    data = bytearray(file.read_bytes())
    name = file.relative_to(directory)
    place = rng.randrange(len(data))
    if kind == "truncate":
        done = f"{name} cut to {place} of {len(data)} bytes"
        del data[place:]
    else:
        bit = rng.randrange(8)
        data[place] ^= 1 << bit
        done = f"{name} bit {bit} of byte {place} flipped"
    file.write_bytes(data)
    if _problem(directory, step) is None:
        raise LmxError(f"the checksums do not notice the damage: {done}")
    return done


def _whole(directory: Path) -> list[int]:
    """The steps of the checkpoints that were saved to the end, damaged or not, oldest first."""
    return sorted(int(f.parent.name) for f in directory.glob(f"*/{manifest.FILE}"))


def _problem(directory: Path, step: int) -> str | None:
    return manifest.problem(epath.Path(directory / str(step)), step)
