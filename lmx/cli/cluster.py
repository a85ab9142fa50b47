"""``lmx check cluster``: whether the processes of a job can work together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmx.cli.output import OutputFile, print_result
from lmx.sharding.launchers import Cluster

if TYPE_CHECKING:
    from lmx.sharding.preflight import Report


@dataclass(frozen=True)
class CheckCluster(Cluster):
    """Checks the processes of a job before it computes: versions, devices, clocks, shared storage, an all-reduce.

    Start it as the job will be started; ``lmx train`` does the same by itself.

    Example: srun --nodes 4 --ntasks-per-node 1 lmx check cluster --directory /shared/runs
    """

    directory: tuple[str, ...] = ()
    """Places that every process must share: paths, or addresses of an object store."""
    json: OutputFile = ""
    """Also write the result as JSON to this file; "-" is standard output."""


def main(argv: Sequence[str]) -> None:
    """Runs ``lmx check cluster`` with these arguments.

    Raises:
      UserError: processes differ, or storage is not shared; it names the hosts.
      LmxError: a process does not answer, or the all-reduce is wrong.
    """
    import tyro

    from lmx.cli.runtime import start_jax

    options = tyro.cli(CheckCluster, prog="lmx check cluster", args=list(argv))
    start_jax(options)
    from lmx.sharding.preflight import preflight
    from lmx.sharding.processes import is_first, together

    with together():
        report = preflight(options.directory, {}, options.start_limit())
    if is_first():
        print_result(report.data(), describe(report), options.json)


def describe(report: "Report") -> str:
    """The report for people: a line for each process, and the all-reduce."""
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()) for facts in report.processes]
    rate = report.reduce_bytes / report.reduce_seconds / 1e9
    return "\n".join(
        [
            *lines,
            f"{report.devices} devices in {len(lines)} processes; clocks within {report.clock_seconds:.2f} s",
            f"all-reduce of {report.reduce_bytes / 1e6:.1f} MB: right, {report.reduce_seconds * 1e3:.1f} ms, "
            f"{rate:.2f} GB/s",
        ]
    )
