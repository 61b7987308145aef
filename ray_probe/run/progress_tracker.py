"""Counts the progress of a run and reports it to a listener."""

import time

import numpy as np

from ray_probe.core.estimator.modes import MODES
from ray_probe.run.messages import ShardSums
from ray_probe.run.progress import Listener, Progress, Summed


class ProgressTracker:
    """Reports progress to a listener; backends call it as shards come in."""

    def __init__(
        self, listener: Listener, rounds: int | None, mode: str, actors: int, summed: Summed = "gradients"
    ) -> None:
        self._listener = listener
        self._summed = summed
        self._rounds = rounds
        self._mode_index = [str(known) for known in MODES].index(mode)
        self._started = time.monotonic()
        self._tokens = 0
        self._squares_M = np.zeros(len(MODES))
        self._round = self._shards = self._collected = self._accumulated = self._version = 0
        self.actors_asked = self.actors_alive = actors

    def start_round(self, number: int, shards: int) -> None:
        """Begin a round."""
        self._round, self._shards, self._collected, self._accumulated = number, shards, 0, 0
        self._tell()

    def collected(self, tokens: int, again: bool = False) -> None:
        """Count a shard's record; `again` where it was counted before."""
        self._tokens += tokens
        self._collected += not again
        self._tell()

    def fitted(self, version: int) -> None:
        """Report a new version of beta."""
        self._version = version
        self._tell()

    def accumulated(self, report: ShardSums) -> None:
        """Count a shard's gradient, or its change in a comparison."""
        self._accumulated += 1
        self._squares_M += [report.sums.advantage.get(mode, np.full(2, np.nan))[1] for mode in MODES]
        self._tell()

    def redone(self, shards: int) -> None:
        """Take back what `shards` shards have summed, lost with their actor."""
        self._accumulated -= shards
        self._tell()

    def staff(self, asked: int, alive: int) -> None:
        """Report requested and live actors whenever either changes."""
        changed = (asked, alive) != (self.actors_asked, self.actors_alive)
        self.actors_asked, self.actors_alive = asked, alive
        if changed:
            self.note(f"actors: asked {asked}, have {alive}")

    def note(self, text: str) -> None:
        """Report one line."""
        self._tell(text)

    def _tell(self, note: str | None = None) -> None:
        reference = self._squares_M[0]
        ratio = float(self._squares_M[self._mode_index] / reference) if reference > 0 else None
        self._listener(
            Progress(
                self._round, self._rounds, self._shards, self._collected, self._accumulated, self._tokens,
                time.monotonic() - self._started, self.actors_asked, self.actors_alive, self._version, ratio, note,
                self._summed,
            )
        )  # fmt: skip
