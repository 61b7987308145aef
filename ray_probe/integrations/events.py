"""The events of a trainer that a hook does not use."""

from typing import Any


class OtherEvents:
    """Accepts every event of a trainer and does nothing.

    Trainers call each event of each callback. A base class of the trainer would answer them, but would have to be
    imported; this one also answers the events that later versions add.
    """

    def __getattr__(self, name: str) -> Any:
        """Return a function without effect for an event, `on_...`."""
        if name.startswith("on_"):
            return _ignore
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""
