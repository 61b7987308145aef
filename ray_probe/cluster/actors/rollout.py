"""The Ray actors, as thin wrappers around plain classes; `ray.remote` is applied where they are created."""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray

from ray_probe.cluster.actors.delivery import deliver
from ray_probe.cluster.actors.own_actors import OwnActor
from ray_probe.cluster.actors.task_errors import is_of_memory
from ray_probe.core.estimator.baselines import PublishedFit
from ray_probe.rollout.loader import Loader, LoadRequest
from ray_probe.run.messages import ActorFacts, FitterSession, GradientReport
from ray_probe.system.failpoints import fail_at


class RolloutActor(OwnActor):
    """Generates, scores and differentiates; `tokens_done` is answered while it works (two threads)."""

    def __init__(self) -> None:
        self._tokens = 0
        self._loader = Loader(self._on_progress)
        self._rollout: Any = None

    def start(self, order: LoadRequest) -> ActorFacts:
        """Load a checkpoint, the first or the next. Not in the constructor, whose errors would lose their type.

        Raises:
            ProbeError: the checkpoint, the device or this node is refused (see `Loader.load`).
        """
        fail_at("roll_before_load")
        self._rollout = None  # its gradient sums are memory too
        self._rollout, about = self._loader.load(order, ray.util.get_node_ip_address())
        return about

    def collect(
        self, shard: Any, group: str, fitter: Any, opening: FitterSession, deadline_s: float, held_positions: int
    ) -> Any:
        """Collect a shard and deliver its record to the fitter, over a death of the fitter too; returns the report.

        Args:
            shard: what to sample.
            group: the rounds since the last commit, as `Rollout.begin` takes it.
            fitter: handle of the fitter.
            opening: the measurement that the fitter is open on.
            deadline_s: seconds to wait for the fitter.
            held_positions: whose graphs may be held until the fit is there.
        """
        self._rollout.begin(group)
        with self._without_graphs_next_time():
            report = self._rollout.collect(shard, held_positions)
        self._rollout.acknowledge(shard, deliver(fitter, opening, report.delivery, deadline_s))
        return report

    def accumulate(self, shard: Any, fit: PublishedFit) -> Any:
        """Add a shard's gradient."""
        fail_at("roll_before_gradient", shard.id)
        with self._without_graphs_next_time():
            return self._rollout.accumulate(shard, fit)

    def gradient_report(self, group: str) -> GradientReport:
        """What the gradient sum holds of these rounds."""
        report: GradientReport = self._rollout.gradient_report(group)
        return report

    def bucket(self, start: int, stop: int, *others: Any) -> Any:
        """A range of the gradient sum, with the same range of other actors added."""
        return self._rollout.bucket(start, stop, *others)

    def tokens_done(self) -> int:
        """Tokens sampled and scored since the start: a count that stands still means a stuck actor."""
        return self._tokens

    @contextlib.contextmanager
    def _without_graphs_next_time(self) -> Iterator[None]:
        """Where memory runs out, no graph is held any more, so that the next attempt has more of it."""
        try:
            yield
        except Exception as error:
            if is_of_memory(error):
                self._rollout.hold_no_graphs()
            raise

    def _on_progress(self, tokens: int) -> None:
        self._tokens += tokens
