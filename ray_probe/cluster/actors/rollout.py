"""The Ray actors, as thin wrappers around plain classes; `ray.remote` is applied where they are created."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from threadpoolctl import threadpool_limits

from ray_probe.cluster.actors.delivery import answer_of, deliver, delivery_of
from ray_probe.cluster.own_actors import Ours
from ray_probe.cluster.pool.failure_policy import is_of_memory
from ray_probe.core.estimator.baselines import BaselineRule, PublishedFit
from ray_probe.fitter.fitter import Counts
from ray_probe.fitter.host import FitterHost
from ray_probe.gradient.layout import Layout
from ray_probe.gradient.store import GradientStore
from ray_probe.rollout.loader import Loader, Order
from ray_probe.run.messages import GradientReport, Opening
from ray_probe.system.failpoints import fail_at


class FitterActor(Ours):
    """Owns the records and the fits of one measurement after the other; numpy only, so that it starts in a moment.

    Made again after its process died, it goes on with the measurement that it was open on. All its methods may be
    called twice.

    Args:
        state: file in which that measurement is kept; None: it is lost with the process.
        owner: names this actor in the file.
    """

    def __init__(self, state: str | None = None, owner: str = "") -> None:
        threadpool_limits(limits=1)
        self._host = FitterHost(None if state is None else Path(state), owner)

    def open(
        self, rule: BaselineRule, policy_id: str, ledger: str, finished: Sequence[Sequence[int]], run: str = ""
    ) -> Opening:
        """Go on from a ledger; returns what deliveries need."""
        return self._host.open(rule, policy_id, Path(ledger), finished, run)

    @ray.method(concurrency_group="queries")  # type: ignore[untyped-decorator]
    def ready(self) -> None:
        """Answers."""

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    def accept(self, message: list[Any]) -> list[Any]:
        """Take in a shard's record (see `delivery`). Raises RecordError for one of a measurement that is over."""
        return answer_of(self._host.accept(*delivery_of(message)))

    @ray.method(concurrency_group="records")  # type: ignore[untyped-decorator]
    def accept_together(self, message: list[Any]) -> list[Any]:
        """The same; records that come while the ledger is written share the next write."""
        return answer_of(self._host.accept_together(*delivery_of(message)))

    def close_round(self, round_number: int, shards: Sequence[int], since: int) -> PublishedFit:
        """Fit; returns the fit that the round's gradients use, as actors need it."""
        with self._host.alone() as fitter:
            return fitter.close_round(round_number, shards, since).for_broadcast()

    def current(self) -> PublishedFit:
        """The newest fit, as actors need it."""
        with self._host.alone() as fitter:
            return fitter.current.for_broadcast()

    def counts(self) -> Counts:
        """What came so far."""
        with self._host.alone() as fitter:
            return fitter.counts

    def notes(self) -> tuple[str, ...]:
        """What the run's log should say."""
        return self._host.notes

    @ray.method(concurrency_group="queries")  # type: ignore[untyped-decorator]
    def beta(self, version: int | None = None) -> dict[str, Any]:
        """A global fit, as results show it; None: the current one. Answered while records are taken in."""
        return self._host.fitter.beta(version)

    @ray.method(concurrency_group="queries")  # type: ignore[untyped-decorator]
    def variance(self) -> dict[str, Any]:
        """How well the current fit explains its own rows. Answered while records are taken in."""
        return self._host.fitter.variance()


class NotOpen(Exception):
    """The writer's process was made again, and has not been told yet what it is at work on."""


class WriterActor(Ours):
    """Keeps the committed gradient of one measurement after the other on disk; numpy only.

    Made again after its process died, it raises NotOpen until it is told to go on. All its methods but `add` may be
    called twice.
    """

    def __init__(self) -> None:
        self._open: GradientStore | None = None

    @property
    def _store(self) -> GradientStore:
        if self._open is None:
            raise NotOpen("writer: no gradient is open")
        return self._open

    def open(self, state: str, layout: Layout, rounds: int, sha256: str | None = None) -> float:
        """Go on from the gradient summed over so many rounds, and clear up; returns its squared norm.

        `sha256` is the digest of its file that is on record (see `GradientStore.open`).
        """
        self._open = None
        store = GradientStore(Path(state), layout)
        norm_sq = store.open(rounds, sha256)
        self._open = store
        return norm_sq

    def go_on(self, state: str, layout: Layout, rounds: int, sha256: str | None = None) -> None:
        """Be what the process before was after so many committed rounds; what it was at work on may be done or not."""
        self._open = GradientStore(Path(state), layout)
        self._open.go_on(rounds, sha256)

    def ready(self) -> None:
        """Answers."""

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    def begin(self) -> str:
        """Start to stage a commit; returns what `add` needs."""
        return self._store.begin()

    def add(self, staging: str, start: int, stop: int, part: Any) -> None:
        """Stage a bucket."""
        self._store.add(staging, start, stop, part)

    def holds(self, staging: str) -> bool:
        """Whether this commit is still being staged."""
        return self._store.holds(staging)

    def commit(self, staging: str, rounds: int) -> tuple[float, str | None]:
        """Put what is staged in place, once; returns its squared norm and its file's sha256.

        Raises NotStaged when it is gone.
        """
        return self._store.commit_once(staging, rounds), self._store.sha256

    def settle(self) -> None:
        """Remove the state before."""
        self._store.settle()

    def save_mean(self, path: str, rounds: int, sequences: int) -> None:
        """Write the mean gradient by parameter name."""
        self._store.save_mean(Path(path), rounds, sequences)


class RolloutActor(Ours):
    """Generates, scores and differentiates; `tokens_done` is answered while it works (two threads)."""

    def __init__(self) -> None:
        self._tokens = 0
        self._loader = Loader(self._on_progress)
        self._rollout: Any = None

    def start(self, order: Order) -> dict[str, Any]:
        """Load a checkpoint, the first or the next. Not in the constructor, whose errors would lose their type.

        Raises:
            ProbeError: the checkpoint, the device or this node is refused (see `Loader.load`).
        """
        fail_at("roll_before_load")
        self._rollout = None  # its gradient sums are memory too
        self._rollout, about = self._loader.load(order, ray.util.get_node_ip_address())
        return about

    def collect(
        self, shard: Any, group: str, fitter: Any, opening: Opening, deadline_s: float, held_positions: int
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
