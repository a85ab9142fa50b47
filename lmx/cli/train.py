"""``lmx train``: train a recipe, or go on with its run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmx.cli.options import read_options
from lmx.cli.output import OutputFile, print_result
from lmx.sharding.launchers import Cluster, find_place


@dataclass(frozen=True)
class Train(Cluster):
    """Trains a recipe into a run directory. Started again, it goes on from the last checkpoint by itself.

    Every field of the recipe is an option. Example: lmx train configs/quickstart.py --train.steps 200 --run-dir runs/a

    In a job of several processes (launch/README.md), each is watched by a parent, which ends it with a clear status
    when it dies or hangs.
    """

    run_dir: str = ""
    """Where the run is kept; runs/RECIPE by default."""
    allow_config_change: tuple[str, ...] = ()
    """Fields (as model.layers, or model for all of it) that may differ from those of the run that goes on."""
    profile: tuple[int, int] | None = None
    """First and last step of a profiler trace, counted from 1; it lands in RUN/profile."""
    restarts: int = 0
    """How often to start again, from the last checkpoint, after a process died or hung."""
    json: OutputFile = ""
    """Also write the summary as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx train`` with these arguments."""
    from lmx.train.supervise import beat, is_supervised

    if not is_supervised():
        asked = read_options("train", Train, argv)
        if asked.restarts or find_place(asked):
            sys.exit(_supervised(argv, asked))
    from lmx.cli.recipes import parse
    from lmx.cli.runtime import start_jax

    options, recipe = parse("train", Train, argv)
    beat(options.heartbeat_limit())
    start_jax(options)
    from lmx.sharding.processes import is_first, together
    from lmx.train.ledger import process_began
    from lmx.train.run import RunOptions, train

    run_dir = Path(options.run_dir or f"runs/{recipe.name}")
    wanted = RunOptions(options.allow_config_change, options.profile, options.start_limit(), process_began())
    with together():
        summary = train(recipe.experiment, run_dir, wanted)
    if is_first():
        print_result(summary, describe(summary, run_dir), options.json)


def _supervised(argv: Sequence[str], options: Train) -> int:
    """The same command as the child of a parent; the exit code of both."""
    from lmx.train.supervise import Limits, Supervisor, own_command

    limits = Limits(options.restarts, options.start_limit(), options.heartbeat_limit())
    supervisor = Supervisor(limits, lambda text: print(f"lmx train: {text}", file=sys.stderr, flush=True))
    return supervisor.run(lambda: [own_command(["train", *argv])])


def describe(summary: dict[str, Any], run_dir: Path) -> str:
    """The summary for people: scores beside the compressor's, samples, and where to look."""
    from lmx.eval.score import in_words
    from lmx.experiment import RunDir
    from lmx.report.goodput import read_goodput

    lines = [f"{summary['steps']} steps, held-out {in_words(summary, 'eval_')}"]
    if summary.get("best_step", summary["steps"]) != summary["steps"]:
        lines.append(
            f"held-out loss was lowest after step {summary['best_step']}, {summary['best_eval_loss']:.4f} nats: that "
            f"checkpoint is kept, --step {summary['best_step']} loads it"
        )
    if "xz_bits_per_byte" in summary:
        lines.append(
            f"bits per byte on held-out text: model {summary['eval_bits_per_byte']:.4f}, xz -9 "
            f"{summary['xz_bits_per_byte']:.4f}, xz -9 after the training text "
            f"{summary['xz_head_start_bits_per_byte']:.4f}"
        )
    if goodput := read_goodput(run_dir):
        lines.append(goodput.sentence())
    lines += _samples(RunDir(run_dir).samples, summary["steps"])
    lines.append(f"run directory: {run_dir}")
    lines.append(f"report: {summary['report'] or 'not drawn: ' + summary['report_missing']}")
    return "\n".join(lines)


def _samples(file: Path, step: int) -> list[str]:
    import json

    if not file.exists():
        return []
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [f"--- sample\n{s['prompt']}{s['text']}\n---" for s in samples if s["step"] == step]
