"""The time of day as the files of a run hold it."""

from datetime import UTC, datetime


def utc_now() -> str:
    """UTC time to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
