"""Ends all processes of a POSIX session: a head, Ray's daemons and its workers, whatever group each of them is in."""

import contextlib
import os
import signal
import time

import psutil

END_S = 5.0
POLL_S = 0.01


def is_over(pid: int) -> bool:
    """Whether a process has ended; one that its parent has not waited for yet has, and its id is still its own."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(pid: int, seconds: float) -> bool:
    """Wait for the end of a process without taking its id away; returns whether it came in time."""
    deadline = time.monotonic() + seconds
    while not (over := is_over(pid)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return over


def members(session: int) -> list[int]:
    """Process ids of a session, this process and zombies left out."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(pid) == session and pid != os.getpid():
                found += [] if is_over(pid) else [pid]
    return found


def end_session(session: int) -> list[int]:
    """Kill every process of a session, this one left out; returns those that are still there after `END_S`.

    Args:
        session: its id, the process id of its leader, which must be still its own (see `wait_for`).
    """
    deadline = time.monotonic() + END_S
    while (left := members(session)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    return left
