"""Work in parts: in this process or in several, with progress on the terminal, resumable part by part."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from lmx.errors import LmxError

PART_BYTES = 8 << 20  # the cache knows parts by number: raise its STORE_VERSION with this
MANY_BYTES = 128 << 20  # below this, starting processes costs more than it saves


class Job(Protocol):
    """A part of the work. ``size`` is in bytes of text, for the progress bar."""

    @property
    def size(self) -> int:
        """Bytes of text."""


J = TypeVar("J", bound=Job)
R = TypeVar("R")


def part_bytes(total: int) -> int:
    """Bytes of text in a part: 8 MiB, or more for a corpus that would give over 4,096 parts."""
    return max(PART_BYTES, total // 4096)


def group(jobs: Iterable[J], limit: int) -> list[tuple[J, ...]]:
    """Neighbours together, in order, until a group has ``limit`` bytes."""
    groups: list[tuple[J, ...]] = []
    current: list[J] = []
    size = 0
    for job in jobs:
        current.append(job)
        size += job.size
        if size >= limit:
            groups.append(tuple(current))
            current, size = [], 0
    return [*groups, tuple(current)] if current else groups


def run_parts(
    function: Callable[[J], R], jobs: Sequence[J], *, label: str, workers: int = 0, progress: bool = True
) -> list[R]:
    """``[function(job) for job in jobs]``, on ``workers`` processes; 0 takes as many as the work is worth.

    Raises:
      LmxError: a worker process died; whatever ``function`` raises.
    """
    workers = workers or _worthwhile_workers(jobs)
    results: dict[int, R] = {}
    finished = _here(function, jobs) if workers <= 1 else _elsewhere(function, jobs, workers)
    for index, result in _shown(finished, jobs, label, progress):
        results[index] = result
    return [results[i] for i in range(len(jobs))]


def _worthwhile_workers(jobs: Sequence[Job]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, len(jobs)) if sum(job.size for job in jobs) >= MANY_BYTES else 1


def _here(function: Callable[[J], R], jobs: Sequence[J]) -> Iterator[tuple[int, R]]:
    for index, job in enumerate(jobs):
        yield index, function(job)


def _elsewhere(function: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[tuple[int, R]]:
    # Spawned, because JAX and tokenizers run threads that a forked process would miss.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start_worker) as pool:
        futures: dict[Future[R], int] = {pool.submit(function, job): i for i, job in enumerate(jobs)}
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise LmxError("a worker process was killed (is memory short?): run the command again to go on") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: the part in hand is finished
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the pool's workers would wait for work for ever


def _shown(
    finished: Iterator[tuple[int, R]], jobs: Sequence[Job], label: str, progress: bool
) -> Iterator[tuple[int, R]]:
    if not progress or not jobs:
        yield from finished
        return
    with bytes_progress() as bar:
        task = bar.add_task(label, total=sum(job.size for job in jobs))
        for index, result in finished:
            bar.advance(task, jobs[index].size)
            yield index, result


def bytes_progress() -> Any:
    """A rich progress display on standard error, in bytes, with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
