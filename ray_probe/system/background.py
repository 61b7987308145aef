"""Jobs beside the work, with a warning where one fails or hangs."""

import queue
import threading
from collections.abc import Callable

from ray_probe.errors import first_line
from ray_probe.system.clock import wait_until

HANGS_S = 30.0
LOOK_S = 60.0
MOST_WAITING = 1000


class Background:
    """Does jobs one after another in a daemon thread.

    Nobody waits for a job, and no error of one leaves the thread.

    Args:
        name: of the thread, and the beginning of its warnings.
        warn: receives one line.
        once: warn of the first failure alone; False: of each.
        hangs_s: time of a job after which it hangs, seconds.
    """

    def __init__(self, name: str, warn: Callable[[str], None], once: bool, hangs_s: float = HANGS_S) -> None:
        self._name, self._warn, self._once, self._hangs_s = name, warn, once, hangs_s
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue(MOST_WAITING)
        self._lock = threading.Lock()
        self._open = 0
        self._thread: threading.Thread | None = None
        self._warned = False
        self._hung = False

    def do(self, job: Callable[[], None]) -> None:
        """Take a job; it is dropped with a warning where many wait already."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._open += 1
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            with self._lock:
                self._open -= 1
            self._failed(f"{MOST_WAITING} jobs wait; the next ones are left out")

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs, or one hangs."""
        with self._lock:
            return self._hung or self._open == 0

    def close(self, deadline_s: float) -> bool:
        """Wait for the jobs; returns whether all have ended in time."""
        return wait_until(lambda: self.idle, deadline_s) and not self._hung

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            timer = threading.Timer(self._hangs_s, self._hangs)
            timer.daemon = True
            timer.start()
            try:
                job()
            except BaseException as error:  # a library may raise SystemExit; the thread goes on to the next job
                self._failed(f"{type(error).__name__}: {first_line(error)}")
            finally:
                timer.cancel()
                with self._lock:
                    self._open -= 1
                    self._hung = False

    def _hangs(self) -> None:
        with self._lock:
            self._hung = True
        self._failed(f"hangs for {self._hangs_s:g} s")

    def _failed(self, why: str) -> None:
        with self._lock:
            silent, self._warned = self._once and self._warned, True
        if not silent:
            more = "; it is tried again, without another warning" if self._once else ""
            self._warn(f"{self._name}: {why}; measurements go on{more}")
