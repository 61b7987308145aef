"""Faults of a commit that no process is needed for: actors that are fakes, whose tasks are done at once."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError
from support.light import BUCKET, light_config, light_prepared

from ray_probe.cluster.pool.worker import Event
from ray_probe.cluster.rounds.commit_group import CommitGroup, RoundOptions
from ray_probe.cluster.rounds.gradient_reduction import Reduction
from ray_probe.errors import ClusterError, ShardError
from ray_probe.fitter.fitter import Counts
from ray_probe.run.backend import Stopped
from ray_probe.run.preparation.plan import Shard
from ray_probe.run.progress_tracker import ProgressTracker

pytestmark = pytest.mark.cluster


class LosesGradients:
    """A pool without processes: tasks are done at once, and the actor is gone whenever its gradient is asked for."""

    leaving: tuple[int, ...] = ()
    asked = 1

    def __init__(self) -> None:
        self.actor, self.lost, self.events = 0, 0, list[Event]()

    @property
    def alive(self) -> list[int]:
        return [self.actor]

    idle = alive

    def forgive(self) -> None:
        pass

    def handle(self, actor: int) -> Any:
        return SimpleNamespace(collect=self.collect, accumulate=self.accumulate)

    def collect(self, shard: Shard, *arguments: Any) -> Any:
        return SimpleNamespace(tokens=1)

    def accumulate(self, shard: Shard, fit: Any) -> Any:
        sums = SimpleNamespace(advantage={})
        return SimpleNamespace(round=0, shard=shard.index, version=1, own_left_out=True, sums=sums)

    def submit(self, actor: int, task: Any, reference: Any) -> None:
        self.events.append(Event(actor, task, reference))

    def wait(self, timeout_s: float) -> list[Event]:
        events, self.events = self.events, []
        return events

    def gradient_report(self, actor: int, group: str, deadline_s: float) -> Any:
        self.actor, self.lost = self.actor + 1, self.lost + 1
        raise ActorUnavailableError("out of memory, say", None)


class FitsAnything:
    """A fitter that has always fitted version 1."""

    def new_notes(self) -> list[str]:
        return []

    def counts(self) -> Counts:
        return Counts(0, 0, (), (), 0, 1)

    def beta(self) -> dict[str, Any]:
        return {"version": 1}

    def close_round(self, *arguments: Any) -> Any:
        return SimpleNamespace(version=1, round=0, rule=SimpleNamespace(fit="leave_one_out"))


def work_on(pool: Any, stop: Callable[[], bool] = lambda: False) -> CommitGroup:
    tracker = ProgressTracker(lambda progress: None, 1, "none", 1)
    return CommitGroup(pool, FitsAnything(), tracker, stop, RoundOptions())


def shards(files: Path) -> tuple[Shard, ...]:
    return light_prepared(light_config(files)).plan.round(0)


def test_a_gradient_that_can_never_be_fetched_ends_the_run_with_its_cause(files: Path) -> None:
    pool = LosesGradients()
    work = work_on(pool)
    work.run_round(shards(files))
    reduction = Reduction(pool, None, None, BUCKET, work.stop, 0)
    with pytest.raises(ClusterError, match=r"round 1: .* could not be fetched 3 times, last: .*memory") as failed:
        work.commit(reduction, first=True)
    assert failed.value.exit_code == 4 and pool.lost == 3


def test_a_gradient_formed_under_another_version_than_the_plans_ends_the_run(files: Path) -> None:
    class Stale(LosesGradients):
        def accumulate(self, shard: Shard, fit: Any) -> Any:
            report = super().accumulate(shard, fit)
            report.version = 0
            return report

    with pytest.raises(ShardError, match=r"^shard 0 of round 1: its baseline is version 0 .*; the plan asks for .* 1"):
        work_on(Stale()).run_round(shards(files))


def test_work_that_is_to_stop_does_so_between_events(files: Path) -> None:
    class Slow(LosesGradients):
        def wait(self, timeout_s: float) -> list[Event]:
            assert timeout_s <= 1.0
            return []

    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        work_on(Slow(), lambda: next(asked)).run_round(shards(files))
