"""Ends all processes of a POSIX session: a head, Ray's daemons and the workers."""

import contextlib
import os
import signal

import psutil

from ray_probe.system.clock import wait_until

END_S = 5.0
POLL_S = 0.01


def is_over(pid: int) -> bool:
    """Returns whether a process has ended; a zombie has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(pid: int, seconds: float) -> bool:
    """Waits for the end of a process without reaping it; returns whether it has ended."""
    return wait_until(lambda: is_over(pid), seconds, POLL_S)


def members(session: int) -> list[int]:
    """Returns process ids of a session, without this process and zombies."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(pid) == session and pid != os.getpid() and not is_over(pid):
                found.append(pid)
    return found


def end_session(session: int) -> list[int]:
    """Kills every process of a session but this one; returns those left after `END_S`.

    Args:
        session: process id of its leader, which must not have been reaped (see `wait_for`).
    """

    def killed() -> list[int]:
        for pid in (left := members(session)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left

    return wait_until(killed, END_S, POLL_S, lambda left: not left)
