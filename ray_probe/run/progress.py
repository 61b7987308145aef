"""Progress of a run; imports nothing, so that every layer can use it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Summed = Literal["gradients", "changes"]
"""What the second half of a round sums: gradients, or the changes of a comparison."""


@dataclass(frozen=True)
class Progress:
    """A snapshot of a run at work.

    Attributes:
        round: the current round, from 0.
        rounds: rounds in the run, None where a budget ends it; 0 in a note from outside rounds, else empty.
        shards: shards in the round.
        collected: shards of the round whose record is in.
        accumulated: shards of the round whose gradient is in, or in a comparison whose change is.
        tokens: response tokens sampled since the run started or resumed.
        elapsed_s: seconds since then.
        actors_asked: rollout actors requested.
        actors_alive: rollout actors that answer.
        version: newest version of beta; 0 before the first.
        variance_ratio: mean squared advantage of the configured mode over that of `none`, over the shards so far; None
            before any.
        note: one line, such as a retry or a warning, or None.
        summed: what `accumulated` counts.
    """

    round: int
    rounds: int | None
    shards: int
    collected: int
    accumulated: int
    tokens: int
    elapsed_s: float
    actors_asked: int
    actors_alive: int
    version: int
    variance_ratio: float | None
    note: str | None = None
    summed: Summed = "gradients"

    @classmethod
    def outside(cls, note: str) -> "Progress":
        """Return a note from outside rounds."""
        return cls(0, 0, 0, 0, 0, 0, 0.0, 0, 0, 0, None, note)


Listener = Callable[[Progress], None]
