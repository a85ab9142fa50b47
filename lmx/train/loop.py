"""The training loop: steps, and what is due between them."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from lmx.checkpoint.checkpointer import Checkpointer
from lmx.data.loader import Loader
from lmx.data.prepare import Prepared
from lmx.data.rows import train_rows
from lmx.errors import Interrupted, UserError
from lmx.eval.score import in_words
from lmx.experiment import Experiment, RunDir
from lmx.sharding.processes import located
from lmx.sharding.rules import Sharding
from lmx.train.diagnosis import not_finite_error
from lmx.train.evaluation import EarlyStopping, HeldOut, Sampler, Translator, eval_values
from lmx.train.ledger import Ledger
from lmx.train.metrics import Recorder, StepClock, Values, open_log
from lmx.train.outage import Outage
from lmx.train.progress import Display
from lmx.train.signals import StopSignal
from lmx.train.state import TrainState, saved
from lmx.train.step import BATCH, jit_step
from lmx.train.stragglers import Stragglers


@dataclass
class Profile:
    """A trace of the steps from ``first`` to ``last`` (counted from 1)."""

    first: int
    last: int
    directory: Path
    running: bool = False

    def check(self, steps: int) -> None:
        """Raises UserError unless these are steps of a run of so many."""
        if not 1 <= self.first <= self.last <= steps:
            raise UserError(
                f"--profile is {self.first} {self.last}, expected a first and a last step from 1 to train.steps {steps}"
            )

    def check_start(self, start: int) -> None:
        """Raises UserError if a run that goes on after ``start`` has these steps behind it, and no trace of them."""
        if self.last <= start and not self.directory.exists():
            raise UserError(
                f"--profile is {self.first} {self.last}, but the run goes on after step {start}: name later steps"
            )

    def before(self, step: int) -> None:
        """Starts the trace before the first of its steps that is still to do."""
        if self.first <= step <= self.last and not self.running:
            jax.profiler.start_trace(str(self.directory))
            self.running = True

    def after(self, step: int, metrics: Any) -> None:
        """Stops it when the last step's result exists."""
        if step == self.last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Writes what there is of the trace, also when training ends within its steps."""
        if self.running:
            jax.profiler.stop_trace()
        self.running = False


class Loop:
    """One run from its current state to its end.

    A position is a count of steps: everything random or read from the data follows from the seed and the step, so a
    run that goes on from a checkpoint does exactly what it would have done.
    """

    def __init__(
        self,
        experiment: Experiment,
        run: RunDir,
        sharding: Sharding,
        prepared: Prepared,
        checkpointer: Checkpointer,
        display: Display,
        stop: StopSignal,
        ledger: Ledger,
        profile: Profile | None = None,
    ):
        self.experiment, self.run, self.sharding, self.prepared = experiment, run, sharding, prepared
        self.checkpointer, self.display, self.stop, self.profile = checkpointer, display, stop, profile
        self.ledger, self.stragglers, self.outage = ledger, Stragglers(run), Outage(stop)
        self.recorder = Recorder(StepClock(experiment.train.batch * experiment.train.length))
        self.early = EarlyStopping(experiment.eval)
        self.held_out = HeldOut(experiment, sharding, prepared)
        self.translator = Translator(experiment, prepared, sharding)
        self.sampler = Sampler(experiment, run, prepared, sharding)
        self.speeds: list[float] = []
        self.last: Values = {}

    def train(self, state: TrainState, start: int, meta: dict[str, Any]) -> TrainState:
        """Trains from step ``start`` to the end; raises Interrupted, after saving, when a signal asks for it."""
        self.early = replace(self.early, **meta.get("early_stopping", {}))
        self.log = open_log(self.run, start, meta.get("unlogged", ""))
        experiment, place = self.experiment, self.sharding.named(BATCH)
        layout = experiment.layout(self.prepared.tokenizer)
        rows = train_rows(self.prepared, length=layout, seed=experiment.train.seed)
        loader = Loader(rows, batch=experiment.train.batch, sharding=place, start_step=start)
        if start < experiment.train.steps and not self.early.stopped:
            self.ledger.train(start)
        try:
            with loader:
                self._catch_up(start, state)
                return self._steps(state, start, loader)
        finally:
            with self.outage.noted():
                self.log.close()
            if self.profile:
                self.profile.close()

    def _catch_up(self, start: int, state: TrainState) -> None:
        """Writes the samples of the step that the run goes on from, if it ended between the save and them."""
        last = self.early.stopped or start == self.experiment.train.steps
        if start and (last or _due(self.experiment.sample.every, start)) and not self.sampler.wrote(start):
            self._sample(start, state)

    def _steps(self, state: TrainState, start: int, loader: Loader) -> TrainState:
        compiled: Any = None
        self.batches: dict[int, Any] = {}
        self.stop.graceful = True
        for step in range(start, start if self.early.stopped else self.experiment.train.steps):
            batch = self._next(loader)
            self.batches = {k: v for k, v in self.batches.items() if k == step - 1} | {step: batch}
            if compiled is None:
                compiled = self._compiled(state, batch)
            if self.profile:
                self.profile.before(step + 1)
            state, metrics = compiled(state, batch)
            if self.profile:
                self.profile.after(step + 1, metrics)
            self._note(self.recorder.push(step + 1, metrics), state)
            if self._between(step + 1, state):
                break
        return state

    def _next(self, loader: Loader) -> Any:
        """The next batch; only what the devices have to wait for it counts as waiting for data."""
        if not loader.ready:
            self.recorder.wait()
        with self.ledger.phase("data_wait"):
            return next(loader)

    def _compiled(self, state: TrainState, batch: Any) -> Any:
        """The compiled step; its compilation is not part of the first step's time."""
        began = time.perf_counter()
        before = self.ledger.enter("compile")
        compiled = jit_step(self.experiment, self.sharding, state.frozen).lower(state, batch).compile()
        self.display.say(f"compiled in {time.perf_counter() - began:.1f} s")
        self.ledger.enter(before)
        self.recorder.clock.restart()
        return compiled

    def _between(self, done: int, state: TrainState) -> bool:
        """Evaluates, samples and saves what is due after ``done`` steps; whether training ends here."""
        config, last = self.experiment, done == self.experiment.train.steps
        if self.checkpointer.failing:
            self.stop.leave("a save that failed")  # it is raised when this state is saved
        interrupted = not last and self.stop.asks(done)
        # Also when interrupted: a resumed run does not come back to this step.
        evaluate, sample = last or _due(config.eval.every, done), last or _due(config.sample.every, done)
        save = interrupted or last or config.checkpoint.due(done)
        save_locally = not save and config.checkpoint.due_locally(done)
        if not (evaluate or sample or save or save_locally):
            return False
        ready, ends = self.recorder.flush(), last
        extra: Values = {}
        if evaluate:
            extra = self._evaluated(state)
            ends |= self.early.stops(extra["eval_loss"], done)
            save |= config.checkpoint.keep_best and self.early.best_step == done
        self._note(ready, state, extra)
        if evaluate and self.early.stopped:
            self.display.say(f"step {done}: training stops early, {self.early}")
        if save or ends:
            self._save(done, state, wait=interrupted)
        elif save_locally:
            self._save(done, state, locally=True)
        if sample or ends:  # after the save: whatever fails here loses no step
            self._sample(done, state)
        if interrupted:
            self.outage.end(done)
            what = f"stopped by {self.stop.received} after step {done}, saved in {self.run.path}"
            raise Interrupted(located(f"{what}; run the same command again to go on"))
        self.recorder.clock.restart()
        return ends

    def _sample(self, done: int, state: TrainState) -> None:
        with self.ledger.phase("evaluation"), self.outage.noted():
            self.sampler.write(done, state.for_eval)

    def _evaluated(self, state: TrainState) -> Values:
        with self.ledger.phase("evaluation"):
            started = time.perf_counter()
            values = eval_values(self.held_out.score(state.for_eval, state.frozen))
            values |= self.translator.score(state.for_eval)
            return values | {"eval_seconds": time.perf_counter() - started}

    def _save(self, done: int, state: TrainState, *, wait: bool = False, locally: bool = False) -> None:
        meta = {"step": done, "early_stopping": self.early.state(), "unlogged": self.log.unlogged}
        kept = saved(self.experiment, state)
        with self.ledger.phase("checkpoint"):
            if locally:
                assert self.checkpointer.local is not None
                self.checkpointer.local.save(done, kept, meta)
            else:
                self.checkpointer.save(done, kept, meta, best=self.early.best_step)
            if wait:
                self.checkpointer.wait()
        with self.outage.noted():
            self.ledger.note(done, now=True)

    def _note(self, ready: tuple[int, Values] | None, state: TrainState, extra: Values | None = None) -> None:
        """Shows and logs a step whose result exists; ends the run when too many were skipped."""
        if ready is None:
            return
        step, values = ready
        train = self.experiment.train
        logged = (
            bool(extra) or step % train.log_every == 0 or step in (1, train.steps) or values["skipped_in_a_row"] > 0
        )
        self.stragglers.add(self.recorder.own_seconds)
        self.speeds.append(values["tokens_per_second"])
        times = self.stragglers.exchange(values["step_seconds"]) if logged else None
        with self.outage.noted():
            if logged:
                self.last = {**values, **(times.values() if times else {}), **(extra or {})}
                self.log.write(step, self.last)
            if times:
                self.stragglers.write(step, times)
            self.ledger.note(step)
            self.display.step(step, values, logged=logged, remark=times.straggler() if times else "")
            if extra:
                self.display.say(f"step {step}: held-out {in_words(extra, 'eval_')}")
        if values["skipped_in_a_row"] >= train.max_skipped:
            raise not_finite_error(
                self.experiment,
                self.sharding,
                self.prepared,
                state,
                self.batches[step - 1],
                step - 1,
                int(values["skipped_in_a_row"]),
            )


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0
