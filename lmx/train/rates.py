"""The learning-rate finder: a few steps of a recipe, each at a higher rate than the one before."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from lmx.data.loader import Loader
from lmx.data.prepare import prepare
from lmx.data.rows import train_rows
from lmx.decode.frozen import load_frozen
from lmx.experiment import Experiment
from lmx.optim.rising import Rising, Smoother, Sweep
from lmx.sharding.mesh import build_mesh
from lmx.sharding.rules import Sharding
from lmx.train.start import fresh_state
from lmx.train.step import BATCH, jit_step


@dataclass(frozen=True)
class SweepOptions:
    """How to sweep.

    Attributes:
      steps: how many, and so how fine.
      first, last: rates.
      smoothing: weight of the past in the average of the losses.
      stop: the sweep ends when that average is this many times the lowest it was.
    """

    steps: int = 100
    first: float = 1e-6
    last: float = 1.0
    smoothing: float = 0.9
    stop: float = 1.5


def sweep_rates(
    experiment: Experiment, options: SweepOptions, progress: Callable[[int, float, float], None] = lambda *_: None
) -> Sweep:
    """Takes steps of an experiment at exponentially rising rates, from its own start and on its own data.

    ``progress`` is told each step's number, rate and the loss after it. Nothing is written but the prepared data.

    Raises:
      UserError: an experiment or options that do not fit.
    """
    smoother, rising = Smoother(options.smoothing, options.stop), Rising(first=options.first, last=options.last)
    train = replace(experiment.train, steps=options.steps, ema=0.0)
    experiment = replace(experiment, schedule=rising, train=train)
    experiment.check()
    sharding = Sharding(build_mesh(experiment.mesh), experiment.rules)
    prepared = prepare(experiment.corpus, accept=experiment.check_tokenizer)
    state, *_ = fresh_state(experiment, sharding, prepared.tokenizer)
    state = replace(state, frozen=load_frozen(experiment, sharding, prepared))
    layout = experiment.layout(prepared.tokenizer)
    rows = train_rows(prepared, length=layout, seed=train.seed)
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    diverged, rate = False, 0.0
    with Loader(rows, batch=train.batch, sharding=sharding.named(BATCH), start_step=0) as loader:
        step = jit_step(experiment, sharding, state.frozen)
        for number in range(options.steps):
            state, metrics = step(state, next(loader))
            if number:  # this loss is what the step before it led to
                losses.append(float(metrics["loss"]))
                rates.append(rate)
                average, diverged = smoother.push(losses[-1])
                smoothed.append(average)
                progress(number, rate, losses[-1])
            if diverged:
                break
            rate = float(metrics["learning_rate"])
    return Sweep(tuple(rates), tuple(losses), tuple(smoothed), diverged)
