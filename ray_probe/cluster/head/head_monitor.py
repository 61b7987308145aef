"""Detects a lost head node.

Without this, Ray ends the process after 60 s and the exit cannot be caught. Actors that the process knows answer
meanwhile, so their answers do not show the loss.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable

LOOK_EVERY_S = 1.0
CONNECT_S = 1.0
OWN_LOST_S = 3.0
"""A head that ray_probe started does not come back."""
LOST_S = 30.0
"""Another head may come back: with an external store, Ray recovers it."""


def reachable(address: str) -> bool:
    """Returns whether a process accepts connections at host:port."""
    host, port = address.rsplit(":", 1)
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), CONNECT_S):
        return True
    return False


class HeadMonitor:
    """Checks a head at most once a second, when it is asked.

    Args:
        address: host:port of the head.
        lost_s: seconds without a connection after which the head is lost.
        clock: monotonic seconds.
        answers: returns whether a process accepts connections at an address.
        is_gone: returns whether the head's process, started by this one, has ended.
    """

    def __init__(
        self,
        address: str,
        lost_s: float,
        clock: Callable[[], float] = time.monotonic,
        answers: Callable[[str], bool] = reachable,
        is_gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self.address = address
        self._lost_s = lost_s
        self._clock = clock
        self._answers = answers
        self._is_gone = is_gone
        self._looked = clock()
        self._missed_s = 0.0

    def is_lost(self) -> bool:
        """Returns whether the head is gone."""
        now = self._clock()
        if now - self._looked >= LOOK_EVERY_S:
            pause_s = min(now - self._looked, self._lost_s / 2)  # a suspended laptop is not a lost head
            self._missed_s = 0.0 if self._answers(self.address) else self._missed_s + pause_s
            self._looked = now
        return self._is_gone() or self._missed_s >= self._lost_s


def end_without(watch: HeadMonitor, log: Callable[[str], None]) -> None:
    """Ends this process, and with it its locks, once the head is lost."""

    def look() -> None:
        while not watch.is_lost():
            time.sleep(LOOK_EVERY_S)
        log(f"the cluster's head at {watch.address} is gone; ended")
        os._exit(1)

    threading.Thread(target=look, name="head monitor", daemon=True).start()
