"""The time of day in files, and waiting with a deadline."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

Answer = TypeVar("Answer")


def utc_now() -> str:
    """Returns the UTC time to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def wait_until(check: Callable[[], Answer], seconds: float, every: float = 0.01) -> Answer:
    """Retries `check` until its answer is true or time is up; returns the answer.

    Args:
        check: called at once, and once more when the time is up.
        seconds: the timeout; 0: `check` is called once.
        every: seconds between two calls.
    """
    deadline = time.monotonic() + seconds
    while not (answer := check()) and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(every, left))
    return answer
