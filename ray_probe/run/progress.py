"""Progress of a run; imports nothing of ours, so that every layer can use it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Summed = Literal["gradients", "changes"]
"""What the second half of a round sums: gradients, or the changes of a comparison."""


@dataclass(frozen=True)
class Progress:
    """A snapshot of a run at work."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"use_attribute_docstrings": True}

    round: int
    """The current round, from 0."""
    rounds: int | None
    """Rounds in the run, None where a budget ends it; 0 in a note from outside rounds, else empty."""
    shards: int
    """Shards in the round."""
    collected: int
    """Shards of the round whose record is in."""
    accumulated: int
    """Shards of the round whose gradient is in, or in a comparison whose change is."""
    tokens: int
    """Response tokens sampled since the run started or resumed."""
    elapsed_s: float
    """Seconds since then."""
    actors_asked: int
    """Rollout actors requested."""
    actors_alive: int
    """Rollout actors that answer."""
    version: int
    """Newest version of beta; 0 before the first."""
    variance_ratio: float | None
    """Mean squared advantage of the configured mode over that of `none`, over the shards so far; None before any."""
    note: str | None = None
    """One line, such as a retry or a warning, or None."""
    summed: Summed = "gradients"
    """What `accumulated` counts."""

    @classmethod
    def outside(cls, note: str) -> "Progress":
        """Return a note from outside rounds."""
        return cls(0, 0, 0, 0, 0, 0, 0.0, 0, 0, 0, None, note)


Listener = Callable[[Progress], None]
