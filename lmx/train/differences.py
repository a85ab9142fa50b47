"""What differs between two finished runs that should be the same, bit for bit."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lmx.checkpoint.checkpointer import load_subtree
from lmx.checkpoint.tree import named_leaves
from lmx.experiment import RunDir
from lmx.train.victim import Victim

IGNORED = {
    *("step_seconds", "tokens_per_second", "eval_seconds"),
    *("slowest_process", "slowest_own_seconds", "median_own_seconds"),
}
"""What metrics.jsonl says of the machine rather than of the run."""
PARTS = ("params", "optimizer", "ema")


def differences(calm: Victim, other: Victim) -> Iterator[str]:
    """What differs between the two finished runs, as sentences."""
    expected, found = _metrics(calm.run), _metrics(other.run)
    for victim, lines in ((calm, expected), (other, found)):
        if [line["step"] for line in lines] != list(range(1, victim.steps + 1)):
            yield f"the metrics of the {victim.name} run lack or repeat one of the {victim.steps} steps"
    for before, after in zip(expected, found, strict=False):
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        if names:
            name = names[0]
            yield f"{name} of step {before['step']} is {after.get(name)}, undisturbed {before.get(name)}"
            break
    for part in PARTS:
        yield from itertools.islice(_different_arrays(calm, other, part), 1)


def _metrics(run: RunDir) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in IGNORED} for line in lines]


def _different_arrays(calm: Victim, other: Victim, part: str) -> Iterator[str]:
    loaded = (load_subtree(v.checkpoints, part, step=v.steps).state for v in (calm, other))
    expected, found = (named_leaves(jax.device_get(state)) for state in loaded)
    for name, array in expected.items():
        if np.asarray(array).tobytes() != np.asarray(found[name]).tobytes():
            yield f"{part}/{'/'.join(name)} differs from the undisturbed run's"
