"""One ray.init and ray.shutdown, with what Ray does to the process put right."""

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
"""A join that nobody waits for any more, while it is at work: Ray's state is this process's, one join's at a time."""

JOIN_S = 10.0  # an idle cluster is joined in 1 s, and a rehearsal was in less than 8 s


@contextlib.contextmanager
def session(options: Mapping[str, Any]) -> Iterator[None]:
    """ray.init and ray.shutdown around the block, with what Ray leaves behind put right.

    The workers of this session have this package on their path, and not this process's working directory.

    Args:
        options: of ray.init, with the address of the cluster to join.

    Raises:
        ClusterError: ray.init failed, or took longer than joining may.
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
    """Whether every join that was given up has come to its end; waits for it as long as joining may take."""
    for thread in tuple(_given_up):
        thread.join(JOIN_S)
        if not thread.is_alive():
            _given_up.remove(thread)
    return not _given_up


def _init(options: Mapping[str, Any]) -> None:
    """ray.init with a deadline: its own waits sit in C++, where nothing interrupts them."""
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
    """Do it in a thread, which is left behind when it takes longer: a head may die or freeze while it is joined.

    Args:
        work: what to do.
        undo: done after it when nobody waits for it any more.
        seconds: how long to wait.
    """
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
            thread.join(seconds)  # what it has begun can be undone only when it is there
        raise
    finally:
        given_up.set()
    if thread.is_alive():
        _given_up.append(thread)
        raise TimeoutError(f"no answer in {seconds:g} s, though there was one a moment ago; see whether its head lives")
    if outcome:
        raise outcome[0]


@contextlib.contextmanager
def _signals_as_before() -> Iterator[Callable[[], None]]:
    """Put SIGTERM's handler back after the block, and, where the caller has one of its own, once Ray is there.

    Ray makes it a SystemExit, which cleans up, or, in a process that only joins, a crash report.
    """
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
