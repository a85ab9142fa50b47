"""A directory on a disk that can be made full."""

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from lmx.checkpoint.loading import SAVING

MEGABYTES = 48
BALLAST = "ballast"


class SmallDisk:
    """A directory that is a small file system of its own where the system allows that (as root, on Linux).

    Args:
      directory: it; made if it is not there.
      checkpoints: the directory in it that a run has its checkpoints in.

    Elsewhere a full disk is played: the marker of a save leads to /dev/full, where every write fails as on a full
    disk. Neither touches any other directory.

    Attributes:
      kind: which of the two it is, as a phrase.
    """

    def __init__(self, directory: Path, checkpoints: Path):
        self._directory, self._checkpoints = directory, checkpoints
        self._mounted = False

    def __enter__(self) -> "SmallDisk":
        self._directory.mkdir(parents=True, exist_ok=True)
        if sys.platform.startswith("linux") and os.geteuid() == 0:
            command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(self._directory)]
            self._mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        self.kind = f"a tmpfs of {MEGABYTES} MB" if self._mounted else "a write to /dev/full"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mounted:
            subprocess.run(["umount", "--lazy", str(self._directory)], check=True)

    def fill(self) -> None:
        """Leaves no room for another checkpoint."""
        if not self._mounted:
            (self._checkpoints / f"{SAVING}.tmp").symlink_to("/dev/full")
            return
        with (self._directory / BALLAST).open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:  # the disk is full, as it should be
                pass

    def free(self) -> None:
        """Makes room again."""
        for file in (self._directory / BALLAST, self._checkpoints / f"{SAVING}.tmp"):
            file.unlink(missing_ok=True)
