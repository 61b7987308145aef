"""One round at work: the schedule's decisions, carried out by pool, fitter and object store."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from ray_probe.cluster.pool import Event, Pool, first_line
from ray_probe.cluster.schedule import MAX_ATTEMPTS, RoundSchedule, Task
from ray_probe.errors import ClusterError
from ray_probe.offline_entropy_probe import RoundOutcome
from ray_probe.plan import Shard
from ray_probe.rollout import Collected, ShardSums
from ray_probe.tracker import Tracker

FITTER_DEADLINE_S = 60.0
GRADIENT_DEADLINE_S = 600.0
POLL_S = 0.5

AskFitter = Callable[..., Any]


class RoundWork:
    """Works one round off, whoever dies on the way.

    Args:
        shards: the round's shards.
        pool: the rollout actors.
        fitter: handle of the fitter, which rollout actors deliver to.
        ask_fitter: calls a method of the fitter under a deadline: returns its value.
        tracker: told of progress.
        lagged: gradients use the fit of the rounds before, and wait for nothing.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        pool: Pool,
        fitter: Any,
        ask_fitter: AskFitter,
        tracker: Tracker,
        lagged: bool,
    ) -> None:
        self._round = shards[0].round
        self._schedule = RoundSchedule(shards)
        self._pool = pool
        self._fitter = fitter
        self._ask_fitter = ask_fitter
        self._tracker = tracker
        self._lagged = lagged
        self._closed = False
        self._fit: Any = None
        self._fit_s = 0.0
        self._collected: dict[int, Collected] = {}
        self._sums: dict[int, ShardSums] = {}
        self._different: list[str] = []
        self._lost_in_reduce: list[str] = []
        pool.forgive()

    def run(self, size: int) -> RoundOutcome:
        """Returns when every shard that was not given up is in the gradient, exactly once.

        Args:
            size: numbers in the flat gradient.
        """
        if self._lagged:
            self._use(self._ask_fitter("current"))
        gradient = None
        while gradient is None:
            while not self._schedule.complete:
                self._step()
            self._close_records()
            gradient = self._reduce(size)
        counted = [index for shards in self._schedule.accumulated_by().values() for index in shards]
        one_kind = self._pool.one_kind_of_cpu
        return RoundOutcome(
            gradient=gradient,
            collected=[self._collected[index] for index in counted],
            sums=[self._sums[index] for index in counted],
            records=self._schedule.records,
            beta=self._ask_fitter("beta"),
            given_up=list(self._schedule.given_up),
            conflicts=sorted(set(self._different)) if one_kind else [],
            regenerated=0 if one_kind else len(self._different),
            retried=self._schedule.retried,
            by_actor=self._schedule.accumulated_by(),
            fit_s=self._fit_s,
        )

    def _step(self) -> None:
        alive = self._pool.alive
        for actor in self._pool.idle:
            task = self._schedule.next_task(actor, alive)
            if task is not None:
                self._submit(actor, task)
        for event in self._pool.wait(POLL_S):
            self._take(event)
        self._tracker.actors_alive = len(self._pool.alive)
        self._close_records()

    def _submit(self, actor: int, task: Task) -> None:
        if task.kind == "collect":
            self._pool.submit(actor, task, "collect", task.shard, self._fitter, FITTER_DEADLINE_S)
        else:
            self._pool.submit(actor, task, "accumulate", task.shard, self._fit)

    def _take(self, event: Event) -> None:
        task: Task | None = event.task
        cause = event.died or event.error
        if task is not None and cause is not None:
            self._failed(task.shard, cause)
        elif task is not None and task.kind == "collect":
            report, status = event.value
            self._collected[task.shard.index] = report
            self._different += [task.shard.id] if status == "different" else []
            self._tracker.collected(report.tokens, again=self._schedule.collected(task.shard))
        elif task is not None:
            self._schedule.accumulated(task.shard)
            self._sums[task.shard.index] = event.value
            self._tracker.accumulated(event.value)
        if event.died is not None:
            self._lost(event.actor)

    def _failed(self, shard: Shard, cause: str) -> None:
        given_up = self._schedule.failed(shard, cause)
        what = f"is given up after {MAX_ATTEMPTS} attempts" if given_up else "is tried again"
        self._tracker.note(f"shard {shard.id} failed ({cause}); it {what}")

    def _lost(self, actor: int) -> None:
        lost = self._schedule.actor_lost(actor)
        if lost:
            self._tracker.redone(lost)

    def _close_records(self) -> None:
        """Once every record is in: fit, and let the gradients begin."""
        if self._closed or not self._schedule.records_complete or not self._schedule.records:
            return
        started = time.monotonic()
        fit = self._ask_fitter("close_round", self._round, self._schedule.records)
        self._fit_s = time.monotonic() - started
        self._closed = True
        if not self._lagged:
            self._use(fit)

    def _use(self, fit: Any) -> None:
        self._fit = ray.put(fit)
        self._schedule.fit_ready = True
        self._tracker.fitted(fit.version)

    def _reduce(self, size: int) -> Any:
        """The round's gradient summed over actors, float64, or None when an actor was lost: its shards are redone."""
        total = np.zeros(size)
        for actor, shards in self._schedule.accumulated_by().items():
            try:
                part = self._pool.ask(actor, "round_gradient", self._round, deadline_s=GRADIENT_DEADLINE_S)
            except RayError as error:
                self._lost_before_commit(actor, first_line(error))
                return None
            if part.shards != shards:
                cause = f"its gradient holds shards {part.shards}, {shards} were asked for"
                self._pool.remove(actor, cause)
                self._lost_before_commit(actor, cause)
                return None
            total += part.vector
        return total

    def _lost_before_commit(self, actor: int, cause: str) -> None:
        """Have the actor's shards done again, unless that came to nothing too often."""
        self._lost_in_reduce.append(cause)
        if len(self._lost_in_reduce) >= MAX_ATTEMPTS:
            raise ClusterError(
                f"round {self._round}: its gradient could not be fetched {MAX_ATTEMPTS} times, last: {cause}; "
                "give actors more memory or fewer parameters (model.trainable), then go on with run --resume"
            )
        self._tracker.note(f"actor {actor} was lost before its gradient was in ({cause}); its shards are done again")
        self._lost(actor)
