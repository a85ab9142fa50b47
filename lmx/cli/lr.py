"""``lmx lr``: find a learning rate for a recipe."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lmx.cli.output import OutputFile, PageFile, print_result


@dataclass(frozen=True)
class Lr:
    """Trains a recipe for some steps at a rate that rises exponentially, until the loss diverges, and suggests a rate:
    a tenth of that at which the smoothed loss is lowest. No run is kept.

    Every field of the recipe is an option; its schedule and number of steps play no part. Give the rate as
    --schedule.peak to train. Example: lmx lr configs/quickstart.py --page rates.html
    """

    steps: int = 100
    """Steps from the first rate to the last: more of them are smoother."""
    first: float = 1e-6
    """The first learning rate."""
    last: float = 1.0
    """The last one, if the loss does not diverge before."""
    smoothing: float = 0.9
    """Weight of the past in the average of the losses."""
    stop: float = 1.5
    """The sweep ends when that average is so many times the lowest it was."""
    page: PageFile = ""
    """Also draw an HTML page with the curve here."""
    json: OutputFile = ""
    """Also write the sweep as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx lr`` with these arguments."""
    from lmx.cli.recipes import parse
    from lmx.cli.runtime import start_jax

    options, recipe = parse("lr", Lr, argv)
    start_jax()
    from rich.console import Console

    from lmx.optim.rising import RULE
    from lmx.report.rates import write_sweep
    from lmx.train.rates import SweepOptions, sweep_rates

    wanted = SweepOptions(options.steps, options.first, options.last, options.smoothing, options.stop)
    with Console(stderr=True).status("preparing") as status:
        told = lambda step, rate, loss: status.update(f"step {step}/{options.steps}: {rate:.1e}, loss {loss:.3f}")  # noqa: E731
        sweep = sweep_rates(recipe.experiment, wanted, told)
    sweep.check()
    ended = "it diverged at" if sweep.diverged else "it did not diverge up to"
    people = [
        f"suggested learning rate {sweep.suggested:.2g}: {RULE}",
        f"the loss is lowest at {sweep.lowest:.2g} and falls fastest at {sweep.steepest:.2g}; "
        f"{ended} {sweep.rates[-1]:.2g}",
    ]
    if options.page:
        people.append(f"page: {write_sweep(sweep, recipe.name, Path(options.page))}")
    numbers = {name: getattr(sweep, name) for name in ("suggested", "lowest", "steepest")}
    result = {"recipe": recipe.name, "rule": RULE, **numbers, **asdict(sweep)}
    print_result(result, "\n".join(people), options.json)
