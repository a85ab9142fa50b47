"""Opening a run directory: a new one, or one to go on with, never one of another experiment."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from etils import epath

from lmx import config
from lmx.checkpoint import manifest
from lmx.errors import UserError
from lmx.experiment import HARMLESS, Experiment, RunDir
from lmx.files import check_reachable

LOCK = "lock"


def check_run(run: RunDir, experiment: Experiment, allowed: Sequence[str]) -> None:
    """Checks that a run directory (held by :func:`locked`) is empty, or belongs to this experiment.

    Args:
      run: where.
      experiment: what is about to be trained.
      allowed: fields (dotted paths, or their beginnings) that may differ from the run's.

    Raises:
      UserError: the directory holds something else, or a run that this experiment would alter; with the difference. Or
        there can be no checkpoints where the experiment wants them.
    """
    for name in ("directory", "local_directory"):
        if address := getattr(experiment.checkpoint, name):
            check_reachable(os.path.join(address, "step"), f"checkpoint.{name} {address}")
    if not run.experiment.exists():
        if any(p.name != LOCK for p in run.path.iterdir()):
            raise UserError(f"--run-dir {run.path} holds files but no run; choose an empty or a new directory")
    elif has_checkpoints(run):  # before the first there is nothing to alter
        _refuse_changes(run, experiment, allowed)


@contextmanager
def locked(run: RunDir) -> Iterator[None]:
    """Holds the run directory; the lock goes with the process, however it ends.

    Raises:
      UserError: another process trains there, or it cannot be made.
    """
    if run.path.is_file():
        raise UserError(f"--run-dir {run.path} is a file, expected a directory or a path that does not exist")
    check_reachable(run.path, f"--run-dir {run.path}")
    run.path.mkdir(parents=True, exist_ok=True)
    with (run.path / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is training in {run.path}; wait for it, or choose another --run-dir"
            ) from error
        yield


def has_checkpoints(run: RunDir) -> bool:
    """Whether the run in this directory was ever saved."""
    if not run.experiment.exists():
        return False
    experiment = run.load_experiment()
    local = run.local_checkpoints_of(experiment)
    saved = epath.Path(run.checkpoints_of(experiment)).glob(f"*/{manifest.FILE}")
    return any(saved) or (local is not None and local.exists())


def _refuse_changes(run: RunDir, experiment: Experiment, allowed: Sequence[str]) -> None:
    def covered(path: str, prefixes: Sequence[str]) -> bool:
        return any(path == p or path.startswith(p + ".") for p in prefixes)

    changes = [c for c in config.diff(run.load_experiment(), experiment) if not covered(c.path, HARMLESS)]
    unused = [name for name in allowed if not any(covered(c.path, [name]) for c in changes)]
    if unused:
        raise UserError(
            f"--allow-config-change names {unused[0]}, which does not differ; what differs: "
            f"{', '.join(c.path for c in changes) or 'nothing'}"
        )
    refused = [c for c in changes if not covered(c.path, allowed)]
    if refused:
        lines = "".join(f"\n  {change}" for change in refused)
        raise UserError(
            f"{run.path} holds a run of another configuration, and going on would alter its training:{lines}\n"
            f"choose another --run-dir, undo the change, or allow it with --allow-config-change "
            f"{' '.join(dict.fromkeys(c.path for c in refused))}"
        )
