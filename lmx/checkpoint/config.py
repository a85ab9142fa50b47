"""When a run is saved, and which of its checkpoints stay."""

from collections.abc import Iterable
from dataclasses import dataclass

from lmx.errors import UserError


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, and which of its checkpoints stay."""

    directory: str = ""
    """Where checkpoints lie: a path, or an address of Google's object store as gs://bucket/run (extra gcs); empty is
    RUN/checkpoints."""
    every: int = 500
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 3
    """How many of the newest good checkpoints stay."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever; 0 keeps none for ever."""
    keep_best: bool = False
    """Also save after each evaluation with a better loss than all before, and keep the checkpoint of the best one."""
    local_directory: str = ""
    """A path on each node's own disk for frequent checkpoints beside the durable ones; empty for none."""
    local_every: int = 0
    """Steps between local checkpoints; 0 for none."""
    asynchronous: bool = True
    """Write while training goes on; this holds one more copy of the state in host memory."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("keep", 1), ("keep_every", 0), ("local_every", 0)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise UserError(f"checkpoint.{name} is {value}, expected {least} or more")

        if bool(self.local_directory) != bool(self.local_every):
            given, missing = sorted(["local_directory", "local_every"], key=lambda n: not getattr(self, n))
            raise UserError(
                f"checkpoint.{given} is {getattr(self, given)}, but checkpoint.{missing} is not set; local checkpoints "
                "need both"
            )
        if "://" in self.local_directory:
            raise UserError(
                f"checkpoint.local_directory is {self.local_directory}, expected a path on each node's own disk; "
                "object stores are for checkpoint.directory"
            )

    def due(self, step: int) -> bool:
        """Whether a checkpoint is wanted after ``step`` steps."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def due_locally(self, step: int) -> bool:
        """Whether a local checkpoint is wanted after ``step`` steps."""
        return self.local_every > 0 and step > 0 and step % self.local_every == 0

    def kept(self, steps: Iterable[int], best: int = 0) -> frozenset[int]:
        """Those of the good ``steps`` that the rules keep; ``best`` is the step of the best evaluation, 0 for none."""
        ordered = sorted(steps)
        lasting = {s for s in ordered if self.keep_every and s % self.keep_every == 0}
        lasting |= {s for s in ordered if self.keep_best and s == best}
        return frozenset(ordered[-self.keep :]) | lasting
