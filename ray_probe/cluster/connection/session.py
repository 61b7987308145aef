"""One `ray.init` and `ray.shutdown`, with a timeout and restored signal handlers."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ray_probe.cluster.head.package_path import package_path
from ray_probe.cluster.head.ray_private import job_config
from ray_probe.errors import ClusterError
from ray_probe.system.signals import deferred

_given_up: list[threading.Thread] = []
"""Joins that timed out and still run; a process can have only one, as Ray's state is global."""

JOIN_S = 10.0  # joining an idle cluster takes 1 s, and the rehearsal took less than 8 s


@contextlib.contextmanager
def session(options: Mapping[str, Any]) -> Iterator[None]:
    """Joins a cluster for the block.

    The workers have this package on their path, and not this process's working directory.

    Args:
        options: of `ray.init`, with the address of the cluster.

    Raises:
        ClusterError: `ray.init` failed, or took longer than `JOIN_S`.
    """
    import ray

    with _signals_as_before() as restore:
        try:
            _init(options)
            restore()
            yield
        finally:
            with deferred():
                ray.shutdown()


def is_settled() -> bool:
    """Returns whether no timed-out join runs any more; waits up to `JOIN_S` for it."""
    for thread in tuple(_given_up):
        thread.join(JOIN_S)
        if not thread.is_alive():
            _given_up.remove(thread)
    return not _given_up


def _init(options: Mapping[str, Any]) -> None:
    import ray

    def work() -> None:
        paths = job_config(package_path())
        ray.init(**options, job_config=paths, log_to_driver=False, logging_level=logging.ERROR)

    try:
        _in_time(work, ray.shutdown, JOIN_S)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(f"cluster: ray.init at {options['address']} failed: {reason}") from error


def _in_time(work: Callable[[], None], undo: Callable[[], None], seconds: float) -> None:
    """Calls `work` in a thread and waits for it.

    Args:
        work: raises what this function raises.
        undo: called after a `work` that ends later than the timeout.
        seconds: timeout.
    """
    # Ray's waits sit in C++ where nothing interrupts them, and a head may die or freeze while it is joined.
    outcome: list[BaseException] = []
    given_up = threading.Event()

    def guarded() -> None:
        try:
            work()
            if given_up.is_set():
                undo()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=guarded, name="ray.init", daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    except BaseException:
        with deferred():
            thread.join(seconds)  # a join can be undone only once it has ended
        raise
    finally:
        given_up.set()
    if thread.is_alive():
        _given_up.append(thread)
        raise TimeoutError(f"no answer in {seconds:g} s, though it answered a moment ago; check that its head lives")
    if outcome:
        raise outcome[0]


@contextlib.contextmanager
def _signals_as_before() -> Iterator[Callable[[], None]]:
    """Restores SIGTERM's handler after the block; yields a function to do so earlier."""
    # Ray's handler raises SystemExit, or in a process that only joins reports a crash. A handler of the caller's own is
    # restored at once.
    before = signal.getsignal(signal.SIGTERM)
    main_thread = threading.current_thread() is threading.main_thread()

    def restore() -> None:
        if callable(before) and main_thread:
            signal.signal(signal.SIGTERM, before)

    try:
        yield restore
    finally:
        if before is not None and main_thread:
            signal.signal(signal.SIGTERM, before)
