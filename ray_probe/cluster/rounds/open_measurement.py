"""Rounds and commits of one measurement on actors that are there: a pool, a fitter and a writer."""

from collections.abc import Sequence
from pathlib import Path

from ray_probe.cluster.actors.fitter import OpenFitterHandle
from ray_probe.cluster.actors.writer import OpenWriterHandle
from ray_probe.cluster.pool.pool import Pool
from ray_probe.cluster.rounds.commit_group import CommitGroup, RoundOptions
from ray_probe.cluster.rounds.gradient_reduction import Reduction
from ray_probe.gradient.layout import BUCKET_NUMBERS, ParameterLayout
from ray_probe.run.backend import RoundOutcome, StopCheck
from ray_probe.run.plan import Shard
from ray_probe.run.progress_tracker import ProgressTracker
from ray_probe.run.result import Beta


class OpenMeasurement:
    """What a backend does between the opening of a measurement and its end.

    Args:
        pool: the rollout actors, with the checkpoint loaded.
        fitter: open on the measurement's ledger.
        writer: open on its gradient, with the rounds that are committed.
        layout: names and shapes of the trainable parameters.
        manner: how a shard is done.
        bucket_numbers: numbers that are moved at once.
    """

    def __init__(
        self,
        pool: Pool,
        fitter: OpenFitterHandle,
        writer: OpenWriterHandle,
        layout: ParameterLayout,
        manner: RoundOptions,
        bucket_numbers: int = BUCKET_NUMBERS,
    ) -> None:
        self._pool = pool
        self._fitter = fitter
        self._writer = writer
        self._layout = layout
        self._manner = manner
        self._bucket_numbers = bucket_numbers
        self._work: CommitGroup | None = None
        counts = fitter.ask("counts")
        self._told = {key for key in (*counts.conflicts, *counts.regenerated) if key[0] < writer.rounds}

    @property
    def gradient_norm_sq(self) -> float:
        """Squared norm of the gradient summed over all committed rounds."""
        return self._writer.norm_sq

    @property
    def gradient_sha256(self) -> str | None:
        """Digest of the file that holds that gradient."""
        return self._writer.sha256

    def beta(self) -> Beta:
        """The fitter's current global fit."""
        report: Beta = self._fitter.ask("beta")
        return report

    def run_round(self, shards: Sequence[Shard], tracker: ProgressTracker, stop: StopCheck) -> RoundOutcome:
        """Work one round off; returns when every shard is in an actor's sum, once."""
        if self._work is None:
            self._work = CommitGroup(self._pool, self._fitter, tracker, stop, self._manner, self._told)
        return self._work.run_round(shards)

    def commit(self) -> list[RoundOutcome]:
        """Bring the actors' sums together and put them on disk, beside the state before."""
        assert self._work is not None, "a round was worked off"
        reduction = Reduction(self._pool, self._writer, self._layout, self._bucket_numbers, self._work.stop)
        committed, in_place = self._writer.rounds, False
        while not in_place:
            outcomes = self._work.commit(reduction, first=committed == 0)
            in_place = reduction.put_in_place(committed + len(outcomes))
        self._told = set(self._work.told)
        self._work = None
        self._pool.release(self._pool.leaving)
        return outcomes

    def settle(self) -> None:
        """The committed rounds count now: the state before them can go."""
        self._writer.ask("settle")

    def save_gradient(self, path: Path, rounds: int, sequences: int) -> None:
        """Write the gradient summed over so many rounds, divided by the responses, by parameter name."""
        self._writer.ask("save_mean", str(path), rounds, sequences)
