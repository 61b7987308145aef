"""The time of day in files, and waiting with a timeout."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

FoundT = TypeVar("FoundT")


def utc_now() -> str:
    """Returns the UTC time to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def wait_until(
    look: Callable[[], FoundT], seconds: float, every_s: float = 0.01, done: Callable[[FoundT], object] = bool
) -> FoundT:
    """Calls `look` until its value is what is waited for; returns the last value.

    Args:
        look: called at once, and once more when the time is up.
        seconds: timeout; 0: `look` is called once.
        every_s: pause between two calls, seconds.
        done: whether a value ends the wait; by default a true one does.
    """
    deadline = time.monotonic() + seconds
    while not done(found := look()) and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(every_s, left))
    return found
