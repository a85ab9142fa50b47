"""``lmx check mesh``, ``faults`` and ``cluster``: a run is the same on any mesh, after any crash, on any hosts."""

from collections.abc import Sequence

from lmx.errors import UserError

USAGE = """usage: lmx check mesh RECIPE [--devices N] ...   the same numbers on every mesh
       lmx check faults [--processes 2]         the same run after every crash
       lmx check cluster [--directory DIR] ...   whether the processes of a job can work together

each has --help with an example, as: lmx check mesh configs/quickstart.py --devices 8
"""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx check`` with these arguments.

    Raises:
      UserError: there is no such check, or its arguments are wrong.
      LmxError: the check failed.
    """
    from lmx.cli import cluster, faults, mesh

    checks = {"mesh": mesh.main, "faults": faults.main, "cluster": cluster.main}
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE, end="")
    elif name in checks:
        checks[name](rest)
    else:
        raise UserError(f"there is no check {name!r}; the checks are {', '.join(checks)}")
