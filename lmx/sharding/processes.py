"""The processes of a job: their start, what they tell each other, and how one of them leaves.

Text goes through the key-value store of JAX's coordination service: it needs no devices, waits as long as it is
told to, and an absent process is noticed by its missing heartbeats.
"""

import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lmx.errors import EXIT_FAILURE, EXIT_USER_ERROR, Interrupted, LmxError, UserError
from lmx.sharding.launchers import DETECTED, Cluster, Place, find_place, local_device_ids

LONG = 24 * 3600.0
"""Seconds that processes wait for each other's work; a dead one is noticed much earlier."""
LINGER = 3.0
"""Seconds that the first process stays when it fails: the others read from it what was wrong."""
LOST = re.compile(r"Gloo|NCCL|[Cc]onnection|coordination|heartbeat|UNAVAILABLE|ABORTED|[Pp]eer")
"""What the runtime's errors say when another process is gone."""
_rounds = itertools.count()


def start(options: Cluster = DETECTED) -> None:
    """Joins the processes of this job, if there are several; must come before anything is computed.

    Raises:
      UserError: the options or a launcher's variables are incomplete. A coordinator that does not answer, or a process
        that does not come, ends this process with one sentence: the runtime would abort.
    """
    place = find_place(options)
    if place is None:
        return
    import jax

    limit = options.start_limit()
    watch = threading.Timer(limit, _give_up, (limit,))
    watch.daemon = True
    watch.start()
    try:
        _initialize(jax, place, limit + 60, options.heartbeat_limit())
    finally:
        watch.cancel()


def _initialize(jax: Any, place: Place, start_seconds: int, heartbeat_seconds: int) -> None:
    given = {"coordinator_address": place.coordinator, "num_processes": place.processes, "process_id": place.process}
    if place.launcher != "TPU":
        given["local_device_ids"] = local_device_ids(place)  # type: ignore[assignment]
    try:
        jax.distributed.initialize(
            **given,
            cluster_detection_method="deactivate" if place.coordinator else None,
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=heartbeat_seconds,
        )
    except ValueError as error:
        if place.launcher != "TPU":  # on a machine with TPU chips that no cluster claims there is nothing to join
            raise UserError(f"the processes of {place.launcher} cannot start: {error}") from error


def _give_up(seconds: int) -> None:
    """Ends this process: it waits inside the runtime, where no exception reaches it."""
    address = _state().coordinator_address
    if is_first():
        what = f"not all of the {count()} processes came to {address} within {seconds} s; see why in their logs"
    else:
        what = (
            f"the coordinator {address} did not answer within {seconds} s; is process 0 running there, and its port "
            "open to this host?"
        )
    print(f"lmx: {located(what)}", file=sys.stderr, flush=True)
    os._exit(EXIT_FAILURE)


def count() -> int:
    """How many processes there are. Touches no devices."""
    return 1 if "jax" not in sys.modules else _state().num_processes


def index() -> int:
    """Which of them this is."""
    return 0 if "jax" not in sys.modules else _state().process_id


def is_first() -> bool:
    """Whether this process is the one that writes logs, metrics and reports."""
    return index() == 0


def located(sentence: str) -> str:
    """The sentence with this process and its host before it, unless it is alone."""
    return f"process {index()} of {count()} on {socket.gethostname()}: {sentence}" if count() > 1 else sentence


def share(text: str, seconds: float = LONG) -> tuple[str, ...]:
    """The ``text`` of every process, by process index. Returns when all of them have called.

    Raises:
      LmxError: a process did not call within ``seconds``; it is named.
    """
    if count() == 1:
        return (text,)
    client, number = _state().client, next(_rounds)
    key, limit = f"lmx/{number}", int(seconds * 1000)
    client.key_value_set(f"{key}/{index()}", json.dumps(text))
    if is_first():
        texts = [_get(client, f"{key}/{i}", limit, f"process {i}") for i in range(count())]
        client.key_value_set(f"{key}/all", json.dumps(texts))
        client.key_value_delete(f"lmx/{number - 1}/")  # all have read it: they have come to this round
    found = _get(client, f"{key}/all", limit, "another process")
    return tuple(found)


def _get(client: Any, key: str, limit: int, who: str) -> Any:
    import jax

    try:
        return json.loads(client.blocking_key_value_get(key, limit))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise LmxError(f"{who} did not answer within {limit / 1000:.0f} s; see its log") from error


def post(topic: str, text: str) -> None:
    """Leaves a text of this process under a topic, in place of its last one; waits for nobody."""
    _state().client.key_value_set(f"lmx-{topic}/{index()}", text, allow_overwrite=True)


def posted(topic: str) -> dict[int, str]:
    """The last text that each process left under a topic, by process index; waits for nobody."""
    found = _state().client.key_value_dir_get(f"lmx-{topic}/")
    return {int(key.rpartition("/")[2]): text for key, text in sorted(found)}


@contextmanager
def agreed() -> Iterator[None]:
    """A block that every process runs; a UserError or LmxError of any is raised on all of them."""
    own: LmxError | None = None
    try:
        yield
    except LmxError as error:
        own = error
    told = share("" if own is None else json.dumps([own.exit_code, str(own)])) if count() > 1 else ()
    if own is not None:
        raise own
    for process, text in enumerate(told):
        if text:
            code, sentence = json.loads(text)
            raise (UserError if code == EXIT_USER_ERROR else LmxError)(f"process {process}: {sentence}")


@contextmanager
def together() -> Iterator[None]:
    """A block that several processes run: an error names its process and host, and ends this process at once.

    An orderly end would wait for the others, which may wait for this one. When interrupted, all end orderly.
    """
    try:
        yield
    except BaseException as error:
        if count() == 1 or isinstance(error, Interrupted):
            raise
        print(f"lmx: {located(_sentence(error))}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if is_first() and isinstance(error, LmxError):
            time.sleep(LINGER)
        os._exit(error.exit_code if isinstance(error, LmxError) else EXIT_FAILURE)


def _sentence(error: BaseException) -> str:
    """What a leaving process says: a sentence for what is known, a traceback for what is not."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, LmxError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ValueError | RuntimeError) and LOST.search(text):  # JAX raises both
        return f"another process is gone, see the logs of the others ({text})"
    return "".join(traceback.format_exception(error))


def _state() -> Any:
    from jax._src import distributed  # JAX has no public way to its key-value store

    return distributed.global_state
