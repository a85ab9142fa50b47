"""The check of faults: a run that is killed and robbed of checkpoints ends as if nothing had happened."""

import itertools
import json
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

from lmx.checkpoint import manifest
from lmx.checkpoint.checkpointer import load_subtree
from lmx.checkpoint.tree import named_leaves
from lmx.errors import EXIT_INTERRUPTED, LmxError, UserError
from lmx.experiment import RunDir
from lmx.train.victim import EVERY, Victim, set_up

SignalName = Literal["SIGKILL", "SIGTERM", "SIGINT"]
Damage = Literal["", "truncate", "flip"]
TIMES = ("step_seconds", "tokens_per_second", "eval_seconds")
"""What metrics.jsonl says of the machine rather than of the run."""
PARTS = ("params", "optimizer", "ema")
FIRST = 3 * EVERY + 1
"""No fault before this step: by then there are two whole checkpoints, so that one may be damaged."""


@dataclass(frozen=True)
class Fault:
    """Attributes: the ``step`` that must have been logged before the signal; whether the signal waits until a
    checkpoint is being written; what is then done to the newest whole checkpoint."""

    step: int
    signal: SignalName = "SIGKILL"
    while_saving: bool = False
    damage: Damage = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a fault.

    Attributes:
      signal, while_saving: as asked.
      step: the last one logged.
      exit_code: of the process.
      damage: the file and what was done to it.
      expected: the newest good checkpoint that was left, 0 if none.
      resumed: the step that the next attempt went on from.
    """

    signal: SignalName
    while_saving: bool
    step: int
    exit_code: int
    damage: str
    expected: int
    resumed: int

    def problem(self) -> str | None:
        """What is wrong with it, or None."""
        code = -signal.SIGKILL if self.signal == "SIGKILL" else EXIT_INTERRUPTED
        if self.exit_code != code:
            return f"{self.signal} after step {self.step} gave exit code {self.exit_code}, expected {code}"
        if self.resumed != self.expected:
            return f"the run went on from step {self.resumed}; the newest good checkpoint was {self.expected}"
        return None


@dataclass(frozen=True)
class FaultCheck:
    """The faults in their order, and in what the two runs differ at the end."""

    steps: int
    outcomes: tuple[Outcome, ...]
    different: tuple[str, ...]

    def problems(self) -> list[str]:
        """Everything that is not as it should be."""
        return [*filter(None, (o.problem() for o in self.outcomes)), *self.different]

    def data(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {**asdict(self), "problems": self.problems(), "same": not self.problems()}

    def verdict(self) -> str:
        """One sentence."""
        if problems := self.problems():
            return "; ".join(problems)
        return (
            f"after {len(self.outcomes)} faults the parameters, the optimizer's state and what was logged of all "
            f"{self.steps} steps equal those of the undisturbed run bit for bit"
        )

    def verify(self) -> None:
        """Raises LmxError with the first problem, if there is one."""
        problems = self.problems()
        if problems:
            raise LmxError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))


def random_faults(runs: int, steps: int, seed: int) -> tuple[Fault, ...]:
    """``runs`` kills, a SIGTERM and a SIGINT at random steps; in every five kills one truncation, one flip.

    Raises:
      UserError: so many faults do not fit into so few steps.
    """
    rng, count = random.Random(seed), runs + 2
    places = range(FIRST, steps - 2 * EVERY)
    if runs < 1 or len(places) < count:
        raise UserError(
            f"--runs {runs}, --steps {steps}: expected at least 1 run and {FIRST + count + 2 * EVERY} steps"
        )
    damages: list[Damage] = ["", "truncate", "", "flip", ""]
    kinds = [Fault(0, while_saving=i % 2 == 0, damage=damages[i % 5]) for i in range(runs)]
    kinds += [Fault(0, "SIGTERM"), Fault(0, "SIGINT")]
    rng.shuffle(kinds)
    chosen = sorted(rng.sample(places, count))
    return tuple(Fault(s, k.signal, k.while_saving, k.damage) for s, k in zip(chosen, kinds, strict=True))


def check_faults(
    faults: Sequence[Fault],
    steps: int = 300,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> FaultCheck:
    """Trains the same run twice, once in peace and once with ``faults``, and compares the two.

    Args:
      faults: in the order of their steps, which lie between :data:`FIRST` and ``steps - 2 * EVERY``.
      steps: of both runs.
      seed: of the corpus, the moments and the damage.
      progress: is told what is about to happen.

    Raises:
      LmxError: a restart failed, or a run stands still.
    """
    with tempfile.TemporaryDirectory(prefix="lmx-faults-") as directory:
        root = Path(directory)
        set_up(root, seed)
        calm, victim = Victim(root, "calm", steps), Victim(root, "killed", steps)
        progress(f"{steps} steps undisturbed")
        _finish(calm, 0)
        rng, wounds = random.Random(seed), []
        for number, fault in enumerate(faults):
            progress(f"fault {number + 1} of {len(faults)}: {fault.signal} after step {fault.step} of {steps}")
            wounds.append(_wound(victim, number, fault, rng))
        progress("the last restart, to the end")
        _finish(victim, len(faults))
        outcomes = tuple(Outcome(**w, resumed=victim.resumed(i + 1)) for i, w in enumerate(wounds))
        return FaultCheck(steps, outcomes, tuple(_differences(calm.run, victim.run, steps)))


def _finish(victim: Victim, number: int) -> None:
    with victim.attempt(number) as attempt:
        attempt.wait_for(lambda: attempt.step() == victim.steps, f"step {victim.steps}")
        if attempt.wait() != 0:
            raise LmxError(f"the run ended with exit code {attempt.process.returncode}: {attempt.tail()}")


def _wound(victim: Victim, number: int, fault: Fault, rng: random.Random) -> dict[str, Any]:
    """Starts the run, lets the fault happen, and says what happened: an Outcome but for ``resumed``."""
    with victim.attempt(number) as attempt:
        attempt.wait_for(lambda: attempt.step() >= fault.step, f"step {fault.step}")
        saving = victim.run.checkpoints / "saving"
        if fault.while_saving:
            attempt.wait_for(saving.exists, "a checkpoint")
        time.sleep(rng.uniform(0, 0.02))
        attempt.process.send_signal(signal.Signals[fault.signal])
        code = attempt.wait()
    damage = _damage(victim.run, fault.damage, rng)
    good = (s for s in reversed(_whole(victim.run)) if _problem(victim.run, s) is None)
    return {
        "signal": fault.signal,
        "while_saving": fault.while_saving,
        "step": attempt.step(),
        "exit_code": code,
        "damage": damage,
        "expected": next(good, 0),
    }


def _damage(run: RunDir, kind: Damage, rng: random.Random) -> str:
    """Damages one file of the newest whole checkpoint; says which, and how."""
    if not kind:
        return ""
    step = _whole(run)[-1]
    folder = run.checkpoints / str(step)
    file = rng.choice(sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size))
    data = bytearray(file.read_bytes())
    name = file.relative_to(run.checkpoints)
    place = rng.randrange(len(data))
    if kind == "truncate":
        done = f"{name} cut to {place} of {len(data)} bytes"
        del data[place:]
    else:
        bit = rng.randrange(8)
        data[place] ^= 1 << bit
        done = f"{name} bit {bit} of byte {place} flipped"
    file.write_bytes(data)
    if _problem(run, step) is None:
        raise LmxError(f"the checksums do not notice the damage: {done}")
    return done


def _whole(run: RunDir) -> list[int]:
    """The steps of the checkpoints that were saved to the end, damaged or not, oldest first."""
    return sorted(int(f.parent.name) for f in run.checkpoints.glob(f"*/{manifest.FILE}"))


def _problem(run: RunDir, step: int) -> str | None:
    return manifest.problem(epath.Path(run.checkpoints / str(step)), step)


def _differences(calm: RunDir, other: RunDir, steps: int) -> Iterator[str]:
    """What differs between the two finished runs, as sentences."""
    expected, found = _metrics(calm), _metrics(other)
    for run, lines in ((calm, expected), (other, found)):
        if [line["step"] for line in lines] != list(range(1, steps + 1)):
            yield f"{run.metrics.name} of the {run.path.name} run lacks or repeats one of the {steps} steps"
    for before, after in zip(expected, found, strict=False):
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        if names:
            name = names[0]
            yield f"{name} of step {before['step']} is {after.get(name)}, undisturbed {before.get(name)}"
            break
    for part in PARTS:
        yield from itertools.islice(_different_arrays(calm, other, part, steps), 1)


def _metrics(run: RunDir) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def _different_arrays(calm: RunDir, other: RunDir, part: str, steps: int) -> Iterator[str]:
    loaded = (load_subtree(run.checkpoints, part, step=steps).state for run in (calm, other))
    expected, found = (named_leaves(jax.device_get(state)) for state in loaded)
    for name, array in expected.items():
        if np.asarray(array).tobytes() != np.asarray(found[name]).tobytes():
            yield f"{part}/{'/'.join(name)} differs from the undisturbed run's"
