"""How long is waited for others, and how often they are replaced: pure, no Ray and no clock of its own."""


LEAP_S = 5.0


class LookClock:
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


