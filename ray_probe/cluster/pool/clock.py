"""A clock for deadlines that does not count this process's own pauses."""

LEAP_S = 5.0


class LookClock:
    """Counts the seconds during which this process observed the others.

    A pause of this process (SIGSTOP, a laptop asleep) or other work counts `LEAP_S` seconds at most, because nothing is
    known of the others meanwhile.

    Args:
        now: seconds of `time.monotonic`.
    """

    def __init__(self, now: float) -> None:
        self._last = now
        self.seconds = 0.0

    def look(self, now: float) -> float:
        """Return the seconds of this clock at `now` seconds of `time.monotonic`."""
        self.seconds += min(max(now - self._last, 0.0), LEAP_S)
        self._last = now
        return self.seconds
