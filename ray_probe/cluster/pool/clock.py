"""How long is waited for others, and how often they are replaced: pure, no Ray and no clock of its own."""

from ray_probe.cluster.pool.failure_policy import Doing

LEAP_S = 5.0
MAX_FAILED_STARTS = 3
MAX_REFUSALS = 3
MAX_IDLE_DEATHS = 10
FITTER_SILENT_S = 30.0


class Watch:
    """A clock for deadlines: seconds in which somebody looked.

    When this process stood still itself (SIGSTOP, a laptop asleep) or was busy with something else, that counts
    `LEAP_S` seconds at most: nothing is known of the others.

    Args:
        now: seconds of `time.monotonic`.
    """

    def __init__(self, now: float) -> None:
        self._last = now
        self.seconds = 0.0

    def look(self, now: float) -> float:
        """Seconds by this clock, at so many seconds of `time.monotonic`."""
        self.seconds += min(max(now - self._last, 0.0), LEAP_S)
        self._last = now
        return self.seconds


class Starts:
    """Whether actors that are gone are still replaced: never without end.

    Starting that failed three times in a row speaks against it, and so do actors that die idle, of no shard, again and
    again. Deaths at a shard need no limit here: they use up its attempts. A checkpoint that was refused three times,
    overwritten since it was loaded say, is refused in every later round too.
    """

    def __init__(self) -> None:
        self._failed = self._idle_deaths = self._refusals = 0

    def worked(self) -> None:
        """An actor has started."""
        self._failed = 0

    def lost(self, doing: Doing, refused: bool = False) -> None:
        """An actor is gone that was doing this; `refused`: it refused the checkpoint."""
        self._refusals += refused
        self._failed += doing == "starting"
        self._idle_deaths += doing == "idle"

    def forgive(self) -> None:
        """Count anew, but for refusals: what kept actors from starting may be over, for a new round say."""
        self._failed = self._idle_deaths = 0

    def reset(self) -> None:
        """Count all anew: there is another checkpoint, or a person asks for actors."""
        self._refusals = 0
        self.forgive()

    @property
    def refused(self) -> bool:
        """Whether the checkpoint was refused too often for another actor to be started."""
        return self._refusals >= MAX_REFUSALS

    def go_on(self, asked: int) -> bool:
        """Whether missing actors are started, of so many that were asked for."""
        return (
            not self.refused and self._failed < MAX_FAILED_STARTS and self._idle_deaths < MAX_IDLE_DEATHS * asked
        )


def fitter_stands_still(silent_s: float, limit_s: float, killed: bool) -> bool:
    """Whether the fitter's process is to be killed, so that Ray makes it again from its ledger.

    Args:
        silent_s: seconds since it answered, or since Ray said that it is at it already.
        limit_s: how long it may be silent.
        killed: it was killed since, and is not there yet. How long that may take is up to who asks it.
    """
    return silent_s > limit_s and not killed
