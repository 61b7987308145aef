"""Whether the cluster's head is there, seen from outside: without it Ray ends a process after 60 s, past catching.

Actors that are known go on to answer meanwhile, so that nothing else tells of it.
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
"""One that others run may: with an external store, Ray goes on after it."""


def reachable(address: str) -> bool:
    """Whether something accepts connections at host:port."""
    host, port = address.rsplit(":", 1)
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), CONNECT_S):
        return True
    return False


class HeadMonitor:
    """Looks at a head once a second, when it is asked.

    Args:
        address: host:port of the head.
        lost_s: it is lost once nobody has answered there for so long.
        clock: monotonic seconds.
        answers: whether somebody answers there.
        is_gone: whether the process of a head that this one has started has ended.
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
        """Whether the head is gone. A pause between two looks, a laptop asleep say, counts as half the time at most."""
        now = self._clock()
        if now - self._looked >= LOOK_EVERY_S:
            pause_s = min(now - self._looked, self._lost_s / 2)
            self._missed_s = 0.0 if self._answers(self.address) else self._missed_s + pause_s
            self._looked = now
        return self._is_gone() or self._missed_s >= self._lost_s


def end_without(watch: HeadMonitor, log: Callable[[str], None]) -> None:
    """From now on: end this process once the head is lost, and let go of the files that it holds."""

    def look() -> None:
        while not watch.is_lost():
            time.sleep(LOOK_EVERY_S)
        log(f"the cluster's head at {watch.address} is gone; ended")
        os._exit(1)

    threading.Thread(target=look, name="head watch", daemon=True).start()
