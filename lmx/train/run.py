"""A training run from its configuration to its report."""

import statistics
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmx import config
from lmx.checkpoint import loading
from lmx.checkpoint.checkpointer import Checkpointer
from lmx.checkpoint.local import LocalTier
from lmx.data import cache
from lmx.data.prepare import Prepared, prepare
from lmx.decode.frozen import load_frozen
from lmx.errors import LmxError
from lmx.eval.compression import XzScore, xz_score
from lmx.experiment import Experiment, RunDir
from lmx.files import read_json, write_durably, write_json
from lmx.kernels.roofline import known_matmul_flops_per_second, side_by_side
from lmx.report.goodput import read_goodput
from lmx.sharding.launchers import START_SECONDS
from lmx.sharding.mesh import build_mesh
from lmx.sharding.preflight import preflight, require_same_data
from lmx.sharding.processes import agreed, count, is_first, share, together
from lmx.sharding.rules import Sharding
from lmx.train.fingerprint import compare, fingerprint
from lmx.train.ledger import Ledger
from lmx.train.loop import Loop, Profile
from lmx.train.metrics import last_values, numbers
from lmx.train.progress import Display
from lmx.train.rundir import check_run, has_checkpoints, locked
from lmx.train.signals import StopSignal
from lmx.train.start import start_state
from lmx.train.state import TrainState, pipeline_plan, state_shardings
from lmx.train.supervise import tell


@dataclass(frozen=True)
class RunOptions:
    """What a command says about a run beside its experiment.

    Attributes:
      allowed_changes: fields of the configuration that may differ from the run's own.
      profile: the first and last step of a trace, counted from 1, or None.
      start_seconds: within this time other processes must answer at the start.
      began: when this attempt began, in seconds since 1970; by default when training is called.
    """

    allowed_changes: Sequence[str] = ()
    profile: tuple[int, int] | None = None
    start_seconds: float = START_SECONDS
    began: float | None = None


def train(experiment: Experiment, run_dir: Path, options: RunOptions = RunOptions()) -> dict[str, Any]:
    """Trains, or goes on training, in ``run_dir``; returns the summary that is also written there.

    With several processes, all of them call this, and the first writes everything but checkpoints.

    Raises:
      UserError: bad configuration, data or run directory.
      Interrupted: a signal came; the state was saved, and the same call goes on.
      LmxError: gradients stayed non-finite, or a checkpoint or another file of the run could not be written.
    """
    experiment = config.typed(experiment)
    experiment.check()
    run = RunDir(run_dir)
    profile = options.profile and Profile(*options.profile, run.path / "profile")
    if profile:
        profile.check(experiment.train.steps)
    ledger = Ledger(run.path if is_first() else None, options.began)
    notes = [_met(experiment, run, options.start_seconds)] if count() > 1 else []
    sharding = Sharding(build_mesh(experiment.mesh), experiment.rules)
    state_shardings(experiment, sharding)
    with ExitStack() as held, StopSignal() as stop:
        prepared, now, found = _prepared(experiment, run, sharding, options, held)
        tell(joined=True, checkpoints=str(loading.absolute(run.checkpoints_of(experiment))))
        local = _local_tier(experiment, run)
        with Checkpointer(run.checkpoints_of(experiment), experiment.checkpoint, local) as checkpointer, together():
            frozen = load_frozen(experiment, sharding, prepared)
            state, start, meta, more = start_state(experiment, run, sharding, checkpointer, prepared.tokenizer)
            if profile:
                profile.check_start(start)
            state = replace(state, frozen=frozen)
            notes += found + _recorded(experiment, run, prepared, now) + more
            with _display(experiment, sharding, prepared, start, notes) as display:
                loop = Loop(experiment, run, sharding, prepared, checkpointer, display, stop, ledger, profile)
                began = time.perf_counter()
                held.callback(ledger.close)
                state = loop.train(state, start, meta)
            ledger.enter("checkpoint")
            checkpointer.wait()
            loop.outage.end(int(state.step))
            if local is not None:
                local.close(remove=True)
            ledger.enter("finish")
        return _summary(experiment, run, prepared, loop, state, time.perf_counter() - began, ledger)


def _prepared(
    experiment: Experiment, run: RunDir, sharding: Sharding, options: RunOptions, held: ExitStack
) -> tuple[Prepared, dict[str, Any], list[str]]:
    """The data, this start's fingerprint, and what differs from the last one's. The first process holds the run
    directory's lock from here on, until ``held`` is left."""
    notes: list[str] = []
    with agreed():
        if is_first():
            held.enter_context(locked(run))
            check_run(run, experiment, options.allowed_changes)
    with agreed():
        prepared = prepare(experiment.corpus, progress=is_first(), accept=experiment.check_tokenizer)
    require_same_data("the data", prepared.fingerprint)
    now = fingerprint(sharding.mesh, prepared)
    with agreed():
        if is_first():
            notes += compare(run, now) if has_checkpoints(run) else []
            if not run.experiment.exists():
                config.save(experiment, run.experiment)
            prepared.save_tokenizer(run.tokenizer)
    return prepared, now, notes


def _recorded(experiment: Experiment, run: RunDir, prepared: Prepared, now: dict[str, Any]) -> list[str]:
    """Writes down, by the first process, what is trained on what; what there is to say about the data."""
    if not is_first():
        return []
    config.save(experiment, run.experiment)  # only now: a change that is refused leaves it as it was
    write_json(run.fingerprint, now)
    layout = experiment.layout(prepared.tokenizer)
    write_json(run.data, prepared.stats(layout))
    return prepared.notes(layout)


def _display(
    experiment: Experiment, sharding: Sharding, prepared: Prepared, start: int, notes: Sequence[str]
) -> Display:
    """The progress of a run, with what there is to say before it."""
    shown = is_first()
    utilization = _utilization(experiment, sharding, prepared) if shown else 0.0
    display = Display(experiment.train.steps, start, utilization, quiet=not shown)
    plan = pipeline_plan(experiment, sharding)
    for note in [*notes, *([str(plan)] if plan else [])]:
        display.say(note)
    return display


def _utilization(experiment: Experiment, sharding: Sharding, prepared: Prepared) -> float:
    """The model FLOPs utilization of one token a second."""
    peak = known_matmul_flops_per_second(experiment.train.compute) * side_by_side(sharding.mesh.devices.flat)
    return experiment.train_flops_per_token(experiment.layout(prepared.tokenizer)) / peak


def _local_tier(experiment: Experiment, run: RunDir) -> LocalTier | None:
    """The node-local checkpoints of this run, if it wants some; its name for them is made once."""
    directory = experiment.checkpoint.local_directory
    if not directory:
        return None
    if is_first() and not run.identity.exists():
        write_durably(run.identity, uuid.uuid4().hex)
    return LocalTier(directory, share(run.identity.read_text(encoding="utf-8") if is_first() else "")[0])


def _met(experiment: Experiment, run: RunDir, seconds: float) -> str:
    """What the preflight of several processes found, as a sentence."""
    settings = config.flatten(experiment) | {"--run-dir": str(run.path.absolute())}
    found = preflight([experiment.checkpoint.directory or str(run.path)], settings, seconds)
    return (
        f"{count()} processes with {found.devices} devices; an all-reduce of {found.reduce_bytes / 1e6:.1f} MB takes "
        f"{found.reduce_seconds * 1e3:.1f} ms; clocks within {found.clock_seconds:.1f} s"
    )


def _summary(
    experiment: Experiment,
    run: RunDir,
    prepared: Prepared,
    loop: Loop,
    state: TrainState,
    seconds: float,
    ledger: Ledger,
) -> dict[str, Any]:
    """What the run came to; written to summary.json and, if it can be drawn, a report, by the first process."""
    done = int(state.step)
    if not is_first():
        return {"run_dir": str(run.path), "steps": done}
    if not loop.last and run.summary.exists() and (told := read_json(run.summary))["steps"] == done:
        return told | numbers({name: told[name] for name in told if _learned(name)}) | _report(run)
    last = loop.last or last_values(run.metrics)  # killed between its last step and here, it has no steps to do
    summary: dict[str, Any] = {
        "run_dir": str(run.path),
        "steps": done,
        "tokens": done * experiment.train.batch * experiment.train.length,
        "training_seconds": seconds,
        "tokens_per_second": statistics.median(loop.speeds) if loop.speeds else None,
        "skipped_steps": int(state.skipped),
        **{name: value for name, value in last.items() if _learned(name)},
    }
    if experiment.checkpoint.keep_best:
        summary |= {"best_step": loop.early.best_step, "best_eval_loss": loop.early.best}
    if experiment.eval.xz:
        score = _cached_xz(prepared)
        summary |= {"xz_bits_per_byte": score.alone, "xz_head_start_bits_per_byte": score.head_start}
    ledger.close()
    goodput = read_goodput(run.path)
    summary["goodput"] = goodput.data() if goodput else None
    write_json(run.summary, summary)
    return summary | _report(run)


def _learned(name: str) -> bool:
    """Whether the summary takes this over from the metrics."""
    return name.startswith("eval_") or name == "loss"


def _cached_xz(prepared: Prepared) -> XzScore:
    file = prepared.root / "xz" / f"{cache.key(prepared.fingerprint, prepared.config.held_out)}.json"
    if file.exists():
        return XzScore(**cache.read_json(file))
    score = xz_score(prepared.texts("held_out"), prepared.texts("train"))
    file.parent.mkdir(parents=True, exist_ok=True)
    cache.write_json(file, {"alone": score.alone, "head_start": score.head_start})
    return score


def _report(run: RunDir) -> dict[str, Any]:
    try:
        from lmx.report.page import write_report

        return {"report": str(write_report([run.path]))}
    except LmxError as error:  # without matplotlib a run is no less complete
        return {"report": None, "report_missing": str(error)}
