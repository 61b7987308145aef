"""The rollout actor and its handle."""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray

from ray_probe.cluster.actors.calls import kill, send
from ray_probe.cluster.actors.fitter import FitterActor, FitterHandle
from ray_probe.cluster.actors.own_actors import OwnActor
from ray_probe.cluster.actors.task_errors import is_of_memory
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.rollout.loader import Loader, LoadRequest
from ray_probe.run.messages import ActorFacts, Collected, FitterSession, GradientReport, ShardSums
from ray_probe.run.preparation.plan import Shard
from ray_probe.system.failpoints import fail_at


class RolloutActor(OwnActor):
    """Samples, scores and differentiates; a second thread answers `tokens_done`."""

    def __init__(self) -> None:
        self._tokens = 0
        self._loader = Loader(self._on_progress)
        self._rollout: Any = None

    def start(self, request: LoadRequest) -> ActorFacts:
        """Load a checkpoint, the first or the next; returns facts about the actor.

        Raises:
            ProbeError: the checkpoint, the device or this node is refused (see `Loader.load`).
        """
        # Not in the constructor: its errors would lose their type.
        fail_at("roll_before_load")
        self._rollout = None  # frees the memory of its gradient sums
        self._rollout, about = self._loader.load(request, ray.util.get_node_ip_address())
        return about

    def collect(
        self, shard: Shard, group: str, fitter: FitterActor, session: FitterSession, held_positions: int
    ) -> Collected:
        """Collect a shard, deliver its record to the fitter, and return the report.

        Args:
            shard: the shard.
            group: the commit group (see `Rollout.begin`).
            fitter: Ray's handle of the fitter.
            session: the fitter's open measurement.
            held_positions: positions whose graphs may be held until the fit is there.
        """
        self._rollout.begin(group)
        with self._without_graphs_next_time():
            report: Collected = self._rollout.collect(shard, held_positions)
        fail_at("roll_before_send", shard.id)
        receipt = FitterHandle(fitter).accept(session, report.delivery)
        fail_at("roll_after_send", shard.id)
        self._rollout.acknowledge(shard, receipt)
        return report

    def accumulate(self, shard: Shard, fit: PublishedFit) -> ShardSums:
        """Add a shard's gradient to the actor's sum."""
        fail_at("roll_before_gradient", shard.id)
        with self._without_graphs_next_time():
            sums: ShardSums = self._rollout.accumulate(shard, fit)
        return sums

    def gradient_report(self, group: str) -> GradientReport:
        """Return what the gradient sum holds of this commit group."""
        report: GradientReport = self._rollout.gradient_report(group)
        return report

    def bucket(self, start: int, stop: int, *others: Any) -> Any:
        """Return a range of the gradient sum, with the same range of other actors added."""
        return self._rollout.bucket(start, stop, *others)

    def tokens_done(self) -> int:
        """Return the tokens sampled and scored so far; a stuck actor's do not grow."""
        return self._tokens

    @contextlib.contextmanager
    def _without_graphs_next_time(self) -> Iterator[None]:
        """Hold no more graphs once memory has run out, to leave more for a retry."""
        try:
            yield
        except Exception as error:
            if is_of_memory(error):
                self._rollout.hold_no_graphs()
            raise

    def _on_progress(self, tokens: int) -> None:
        self._tokens += tokens


class RolloutHandle:
    """The handle of a rollout actor; its methods return references to results.

    Args:
        actor: Ray's handle.
    """

    def __init__(self, actor: RolloutActor) -> None:
        self.actor = actor

    def start(self, request: LoadRequest) -> Any:
        """Load a checkpoint; the reference gives facts about the actor."""
        return send(self.actor.start, request)

    def collect(self, shard: Shard, group: str, fitter: FitterHandle, held_positions: int) -> Any:
        """Collect a shard and deliver its record; the reference gives a `Collected`."""
        assert fitter.session is not None, "`open` comes first"
        return send(self.actor.collect, shard, group, fitter.actor, fitter.session, held_positions)

    def accumulate(self, shard: Shard, fit: PublishedFit) -> Any:
        """Add a shard's gradient to the actor's sum; the reference gives a `ShardSums`."""
        return send(self.actor.accumulate, shard, fit)

    def gradient_report(self, group: str) -> Any:
        """Ask what the gradient sum holds; the reference gives a `GradientReport`."""
        return send(self.actor.gradient_report, group)

    def bucket(self, start: int, stop: int, *others: Any) -> Any:
        """Add up a range of sums; `others` and the result are references to arrays."""
        return send(self.actor.bucket, start, stop, *others)

    def tokens_done(self) -> Any:
        """Ask for the count of tokens; the reference gives an int."""
        return send(self.actor.tokens_done)

    def kill(self) -> None:
        """End the actor for good."""
        kill(self.actor)
