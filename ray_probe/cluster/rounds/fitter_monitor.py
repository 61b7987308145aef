"""Kills a fitter that hangs, so that Ray restarts it from its ledger.

Ray restarts a crashed fitter by itself. Delivery timeouts are longer than a restart.
"""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from ray_probe.cluster.actors.fitter import FitterHandle
from ray_probe.cluster.pool.clock import LookClock

ASK_EVERY_S = 5.0
FITTER_SILENT_S = 30.0


class FitterMonitor:
    """Asks the fitter now and then whether it answers, without waiting.

    Args:
        fitter: the fitter.
        note: called with a line on a kill.
        clock: seconds of `time.monotonic`.
        silent_s: seconds without an answer after which the fitter is killed.
    """

    def __init__(
        self,
        fitter: FitterHandle,
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        silent_s: float = FITTER_SILENT_S,
    ) -> None:
        self._fitter = fitter
        self._note = note
        self._clock = clock
        self._silent_s = silent_s
        self._look_clock = LookClock(clock())
        self._heard_at = 0.0
        self._heartbeat: Any = None
        self._killed = False

    def look(self) -> None:
        """Ask when it is time, take in the answer, and kill a fitter that hangs."""
        now = self._look_clock.look(self._clock())
        if self._heartbeat is None and now - self._heard_at >= min(ASK_EVERY_S, self._silent_s / 4):
            self._heartbeat = self._fitter.heartbeat()
        if self._heartbeat is not None and ray.wait([self._heartbeat], timeout=0)[0]:
            self._hear(now)
        if fitter_hangs(now - self._heard_at, self._silent_s, self._killed):
            self._killed = True
            self._note(f"fitter: no answer in {self._silent_s:g} s; it is killed, and restarted from its ledger")
            self._fitter.restart()

    def _hear(self, now: float) -> None:
        heartbeat, self._heartbeat = self._heartbeat, None
        self._heard_at = now
        try:
            ray.get(heartbeat, timeout=ASK_EVERY_S)
            self._killed = False
        except ActorUnavailableError:
            return  # Ray is restarting it
        except RayActorError:
            return  # dead for good: the next call of the fitter raises at once


def fitter_hangs(silent_s: float, limit_s: float, killed: bool) -> bool:
    """Whether the fitter's process is to be killed.

    Args:
        silent_s: seconds since its last answer, or since Ray reported a restart.
        limit_s: how long it may be silent.
        killed: it was killed since, and Ray has not restarted it yet.
    """
    return silent_s > limit_s and not killed
