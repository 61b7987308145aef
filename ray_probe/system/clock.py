"""The time of day as the files of a run hold it, and waiting with a timeout."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

FoundT = TypeVar("FoundT")


def utc_now() -> str:
    """UTC time to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def wait_until(
    look: Callable[[], FoundT], seconds: float, every_s: float, done: Callable[[FoundT], object] = bool
) -> FoundT:
    """Calls `look` until its value is what is waited for; returns the last value.

    Args:
        look: called at least once.
        seconds: timeout.
        every_s: pause between two calls, seconds.
        done: whether a value ends the wait; by default a true one does.
    """
    deadline = time.monotonic() + seconds
    while not done(found := look()) and time.monotonic() < deadline:
        time.sleep(every_s)
    return found
