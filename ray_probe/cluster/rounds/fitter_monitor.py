"""A fitter that stands still is killed while the run waits for shards, so that Ray makes it again from its ledger.

Who delivers to it waits longer than that takes. A fitter that dies needs no help: Ray sees that by itself.
"""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from ray_probe.cluster.pool.clock import LookClock

ASK_EVERY_S = 5.0
FITTER_SILENT_S = 30.0


class FitterMonitor:
    """Asks the fitter now and then whether it is there, and waits for nothing.

    Args:
        fitter: its Ray handle.
        note: told of a kill.
        clock: seconds of `time.monotonic`.
        silent_s: seconds without an answer after which it is killed.
    """

    def __init__(
        self,
        fitter: Any,
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        silent_s: float = FITTER_SILENT_S,
    ) -> None:
        self._fitter = fitter
        self._note = note
        self._clock = clock
        self._silent_s = silent_s
        self._watch = LookClock(clock())
        self._heard_at = 0.0
        self._question: Any = None
        self._killed = False

    def look(self) -> None:
        """Ask when it is time to, hear what has come, act."""
        now = self._watch.look(self._clock())
        if self._question is None and now - self._heard_at >= min(ASK_EVERY_S, self._silent_s / 4):
            self._question = self._fitter.ready.remote()
        if self._question is not None and ray.wait([self._question], timeout=0)[0]:
            self._hear(now)
        if fitter_stands_still(now - self._heard_at, self._silent_s, self._killed):
            self._killed = True
            self._note(f"fitter: no answer in {self._silent_s:g} s; it is killed, and made again from its ledger")
            ray.kill(self._fitter, no_restart=False)

    def _hear(self, now: float) -> None:
        question, self._question = self._question, None
        self._heard_at = now
        try:
            ray.get(question, timeout=ASK_EVERY_S)
            self._killed = False
        except ActorUnavailableError:
            return  # Ray is at it
        except RayActorError:
            return  # gone for good: whoever needs it is told so at once


def fitter_stands_still(silent_s: float, limit_s: float, killed: bool) -> bool:
    """Whether the fitter's process is to be killed, so that Ray makes it again from its ledger.

    Args:
        silent_s: seconds since it answered, or since Ray said that it is at it already.
        limit_s: how long it may be silent.
        killed: it was killed since, and is not there yet. How long that may take is up to who asks it.
    """
    return silent_s > limit_s and not killed
