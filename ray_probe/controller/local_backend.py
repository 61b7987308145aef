"""A backend in this process, without Ray, for tests and library users."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ray_probe.core.estimator.baselines import BaselineRule
from ray_probe.fitter.fitter import Fitter
from ray_probe.gradient.layout import BUCKET_NUMBERS, ParameterLayout
from ray_probe.gradient.store import GradientStore
from ray_probe.run.backend import Commit, RoundOutcome, StopCheck, new_group, refuse_if_stopped
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.plan import Shard
from ray_probe.run.progress_tracker import ProgressTracker
from ray_probe.run.result import Beta
from ray_probe.run.round_checks import check_baseline, check_reached, ids_of, told_with

if TYPE_CHECKING:
    from ray_probe.rollout.rollout import Rollout


class LocalBackend:
    """Runs rounds on rollouts in this process, from the state of a run directory.

    Args:
        rollouts: get the shards in turn.
        rule: of the baseline.
        policy_id: of the records.
        directory: of the run, with the ledger and the committed gradient.
        bucket_numbers: numbers of the gradient summed at once.
        held_positions: positions whose graphs a rollout may hold until the fit; 0: two forward passes.

    Attributes:
        fitter: of the run's records.
        store: of the committed gradient.
    """

    def __init__(
        self,
        rollouts: "Sequence[Rollout]",
        rule: BaselineRule,
        policy_id: str,
        directory: RunDirectory,
        bucket_numbers: int = BUCKET_NUMBERS,
        held_positions: int = 0,
    ) -> None:
        finished = [entry.records for entry in directory.finished_rounds()]
        self._rollouts = rollouts
        self.fitter = Fitter(rule, policy_id, directory.ledger, finished)
        self.store = GradientStore(directory.state, self.layout)
        self.store.open(len(finished), directory.gradient_digests(), directory.gradient_window())
        self._committed = len(finished)
        self._bucket_numbers = bucket_numbers
        self._held_positions = held_positions
        self._open: list[RoundOutcome] = []
        self._group = new_group()

    @property
    def actors(self) -> int:
        """Number of rollouts."""
        return len(self._rollouts)

    @property
    def layout(self) -> ParameterLayout:
        """Names and shapes of the trainable parameters."""
        return self._rollouts[0].layout

    def beta(self) -> Beta:
        """Returns the fitter's current global fit."""
        return self.fitter.beta()

    def run_round(self, shards: Sequence[Shard], tracker: ProgressTracker, stop: StopCheck) -> RoundOutcome:
        """Runs one round, shard after shard."""
        outcome = RoundOutcome(shards[0].round)
        dealt = [(shard, self._rollouts[shard.index % self.actors]) for shard in shards]
        for rollout in self._rollouts:
            rollout.begin(self._group)
        for shard, rollout in dealt:
            refuse_if_stopped(stop)
            report = rollout.collect(shard, self._held_positions)
            rollout.acknowledge(shard, self.fitter.accept(report.delivery))
            outcome.collected.append(report)
            tracker.collected(report.tokens)
        started = time.monotonic()
        outcome.records = [shard.index for shard in shards]
        fit = self.fitter.close_round(outcome.round, outcome.records, since=self._committed).for_broadcast()
        outcome.fit_s = time.monotonic() - started
        tracker.fitted(fit.version)
        for shard, rollout in dealt:
            refuse_if_stopped(stop)
            sums = rollout.accumulate(shard, fit)
            check_baseline(sums, fit)
            outcome.sums.append(sums)
            tracker.accumulated(sums)
        outcome.beta = self.fitter.beta()
        counts, number = self.fitter.counts, outcome.round
        outcome.conflicts = ids_of(told_with(number, number, counts.conflicts, counts.conflicts))
        outcome.regenerated = len(told_with(number, number, counts.regenerated, counts.regenerated))
        outcome.by_actor = {
            number: tuple(shard.index for shard, rollout in dealt if rollout is self._rollouts[number])
            for number in range(self.actors)
        }
        self._open.append(outcome)
        return outcome

    def commit(self, window: int) -> Commit:
        """Writes the summed gradient of the open rounds."""
        if self._committed == 0:  # a parameter reached by one commit stays reached
            check_reached(self.layout, [rollout.gradient_report(self._group) for rollout in self._rollouts])
        staging = self.store.begin(window)
        for start, stop in self.layout.buckets(self._bucket_numbers):
            first, *others = self._rollouts
            total = first.bucket(start, stop, *(rollout.bucket(start, stop) for rollout in others))
            self.store.add(staging, start, stop, total)
        outcomes, self._open, self._group = self._open, [], new_group()
        self._committed += len(outcomes)
        norm_sq = self.store.commit(self._committed)
        return Commit(outcomes, norm_sq, self.store.cross, self.store.sha256)

    def settle(self) -> None:
        """Removes the state before the last commit."""
        self.store.settle()

    def save_gradient(self, path: Path, rounds: int, sequences: int) -> None:
        """Writes the mean gradient per response, by parameter name."""
        self.store.save_mean(path, rounds, sequences)
