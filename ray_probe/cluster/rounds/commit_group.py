"""Runs the rounds of a commit group, as the schedule decides."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ray_probe.cluster.actors.fitter import FitterHandle
from ray_probe.cluster.pool.failure_policy import MAX_ATTEMPTS
from ray_probe.cluster.pool.pool import Pool
from ray_probe.cluster.pool.worker import Event
from ray_probe.cluster.rounds.fitter_monitor import FitterMonitor
from ray_probe.cluster.rounds.gradient_reduction import Lost, Reduction
from ray_probe.cluster.rounds.schedule import Schedule, Task
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.errors import ClusterError
from ray_probe.fitter.fitter import Counts
from ray_probe.run.backend import RoundOutcome, StopCheck, new_group, refuse_if_stopped
from ray_probe.run.messages import Collected, ShardKey, ShardSums
from ray_probe.run.preparation.plan import Shard
from ray_probe.run.progress_tracker import ProgressTracker
from ray_probe.run.result import Beta
from ray_probe.run.round_checks import check_baseline, ids_of, told_with

POLL_S = 0.5


@dataclass
class _Round:
    """One round's reports; those of a retried shard replace its earlier ones.

    Attributes:
        fit: the fit that its gradients use; None before it is published.
        closed: the fitter has folded its records.
    """

    fit: PublishedFit | None = None
    closed: bool = False
    fit_s: float = 0.0
    beta: Beta = field(default_factory=Beta)
    collected: dict[int, Collected] = field(default_factory=dict)
    sums: dict[int, ShardSums] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundOptions:
    """How shards are processed.

    Attributes:
        lagged: gradients use the fit of earlier rounds and do not wait for their own.
        held_positions: positions whose graphs an actor may hold until the fit; 0: every response is scored twice.
    """

    lagged: bool = False
    held_positions: int = 0


class CommitGroup:
    """Runs rounds up to a commit, over deaths of actors.

    Args:
        pool: the rollout actors.
        fitter: open on the measurement.
        tracker: receives progress.
        stop: checked between events.
        options: how shards are processed.
        reported: shards of earlier rounds that came again with other bytes and that their outcomes report.
    """

    def __init__(
        self,
        pool: Pool,
        fitter: FitterHandle,
        tracker: ProgressTracker,
        stop: StopCheck,
        options: RoundOptions,
        reported: Collection[ShardKey] = (),
    ) -> None:
        self._group = new_group()
        self._schedule = Schedule()
        self._rounds: dict[int, _Round] = {}
        self._pool = pool
        self._fitter = fitter
        self._fitter_monitor = FitterMonitor(fitter, tracker.note)
        self._tracker = tracker
        self.stop = stop
        self._options = options
        self.reported: frozenset[ShardKey] = frozenset(reported)

    def run_round(self, shards: Sequence[Shard]) -> RoundOutcome:
        """Return once every shard not given up is in an actor's sum, exactly once."""
        number = shards[0].round
        self._pool.forgive()
        self._schedule.open_round(shards)
        self._rounds[number] = _Round()
        if self._options.lagged:
            self._use(number, self._fitter.current())
        self._process(number)
        self._rounds[number].beta = self._fitter.beta()
        for note in self._fitter.new_notes():
            self._tracker.note(note)
        return self._outcome(number, self._fitter.counts())

    def commit(self, reduction: Reduction, first: bool) -> list[RoundOutcome]:
        """Stage the sum of all rounds with the writer; shards lost meanwhile are retried.

        Args:
            reduction: adds up the actors' sums.
            first: nothing is committed yet.

        Raises:
            ClusterError: `MAX_ATTEMPTS` attempts failed.
            ShardError: every shard of a round was given up.
        """
        newest, causes = max(self._rounds), list[str]()
        while len(causes) < MAX_ATTEMPTS:
            self._process(newest)
            counts = self._fitter.counts()
            outcomes = [self._outcome(number, counts) for number in self._rounds]
            for outcome in outcomes:
                outcome.refuse_without_sums()
            lost = reduction.attempt(self._group, self._schedule.accumulated_by(), first)
            if lost is None:
                self.reported = frozenset((*counts.conflicts, *counts.regenerated))
                return outcomes
            self._lost_before_commit(lost)
            causes.append(lost.cause)
        raise ClusterError(
            f"round {newest + 1}: its gradient could not be fetched {MAX_ATTEMPTS} times, last: {causes[-1]}; "
            "give actors more memory or fewer parameters (model.trainable), then go on with run --resume"
        )

    def _process(self, newest: int) -> None:
        while not self._schedule.complete:
            refuse_if_stopped(self.stop)
            self._deal()
            for event in self._pool.wait(POLL_S):
                self._take(event)
            self._tracker.staff(self._pool.asked, len(self._pool.alive))
            self._close_records(newest)
            self._fitter_monitor.look()
        self._close_records(newest)

    def _deal(self) -> None:
        """Give every idle actor a task, and release leaving actors that hold nothing."""
        leaving = self._pool.leaving
        staying = [actor for actor in self._pool.alive if actor not in leaving]
        for actor in self._pool.idle:
            task = self._schedule.next_task(actor, staying, actor in leaving)
            if task is not None:
                self._submit(actor, task)
            elif actor in leaving and not self._schedule.depends_on(actor):
                self._pool.release([actor])

    def _submit(self, actor: int, task: Task) -> None:
        shard, handle = task.shard, self._pool.handle(actor)
        if task.kind == "collect":
            reference = handle.collect(shard, self._group, self._fitter, self._options.held_positions)
        else:
            fit = self._rounds[shard.round].fit
            assert fit is not None, "gradients wait for their fit"
            reference = handle.accumulate(shard, fit)
        self._pool.submit(actor, task, reference)

    def _take(self, event: Event) -> None:
        task: Task | None = event.task
        decision = event.decision
        if decision is None:
            assert task is not None, "an event without a task is a fault"
            done = self._collected if task.kind == "collect" else self._accumulated
            done(task.shard, event.value)
            return
        if task is not None:
            assert decision.shard is not None, "the shard of a failed task is charged or spared"
            self._tracker.note(self._schedule.failed(task.shard, decision.cause, decision.shard, decision.by_memory))
        if decision.replace:
            self._lost(event.actor)

    def _collected(self, shard: Shard, report: Collected) -> None:
        self._rounds[shard.round].collected[shard.index] = report
        self._tracker.collected(report.tokens, again=self._schedule.collected(shard))

    def _accumulated(self, shard: Shard, report: ShardSums) -> None:
        part = self._rounds[shard.round]
        assert part.fit is not None, "gradients wait for their fit"
        check_baseline(report, part.fit)
        self._schedule.accumulated(shard)
        part.sums[shard.index] = report
        if shard.round == max(self._rounds):
            self._tracker.accumulated(report)

    def _lost(self, actor: int) -> None:
        lost = self._schedule.actor_lost(actor)
        if lost[max(self._rounds)]:
            self._tracker.redone(lost[max(self._rounds)])

    def _lost_before_commit(self, lost: Lost) -> None:
        actors = ", ".join(map(str, lost.actors))
        event = f"actors {actors} were lost" if lost.actors else "the gradient was not fetched"
        self._tracker.note(f"{event} before the commit ({lost.cause}); lost shards are retried")
        for actor in lost.actors:
            self._lost(actor)

    def _close_records(self, number: int) -> None:
        """Fit once every record of the round is in, and let its gradients begin."""
        part, records = self._rounds[number], self._schedule.records(number)
        if part.closed or not self._schedule.records_complete(number) or not records:
            return
        started = time.monotonic()
        fit = self._fitter.close_round(number, records, min(self._rounds))
        part.fit_s = time.monotonic() - started
        part.closed = True
        if not self._options.lagged:
            self._use(number, fit)

    def _use(self, number: int, fit: PublishedFit) -> None:
        self._rounds[number].fit = fit
        self._schedule.fit_ready(number)
        self._tracker.fitted(fit.version)

    def _outcome(self, number: int, counts: Counts) -> RoundOutcome:
        part, summed_by = self._rounds[number], self._schedule.accumulated_by()
        by_actor = {actor: tuple(i for n, i in keys if n == number) for actor, keys in summed_by.items()}
        counted = [index for shards in by_actor.values() for index in shards]
        first = min(self._rounds)
        return RoundOutcome(
            round=number,
            collected=[part.collected[index] for index in counted],
            sums=[part.sums[index] for index in counted],
            records=self._schedule.records(number),
            beta=part.beta,
            given_up=list(self._schedule.given_up(number)),
            conflicts=ids_of(told_with(number, first, counts.conflicts, self.reported)),
            regenerated=len(told_with(number, first, counts.regenerated, self.reported)),
            retried=self._schedule.retried[number],
            by_actor={actor: shards for actor, shards in by_actor.items() if shards},
            fit_s=part.fit_s,
        )
