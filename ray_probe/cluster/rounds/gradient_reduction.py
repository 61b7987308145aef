"""Adds up the actors' gradient sums and stages the total with the writer.

Buckets go through the object store from actor to actor and on to the writer, never through this process. The actors
keep their sums until the commit is done, so a failed attempt can be repeated. After a death of the writer everything is
staged again, which does not use up an attempt.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from ray_probe.cluster.actors.handle import ANSWER_DEADLINE_S
from ray_probe.cluster.actors.writer import WriterHandle
from ray_probe.cluster.connection.ray_errors import first_line, task_error
from ray_probe.cluster.pool.pool import Pool
from ray_probe.errors import ProbeError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.store import NotStaged
from ray_probe.run.backend import StopCheck, refuse_if_stopped
from ray_probe.run.messages import ShardKey
from ray_probe.run.round_checks import check_reached

IN_FLIGHT = 2
BUCKET_DEADLINE_S = 600.0
POLL_S = 0.5


@dataclass(frozen=True)
class Lost:
    """Why an attempt failed, and the actors whose shards must be retried."""

    cause: str
    actors: tuple[int, ...]


def children(place: int, count: int) -> tuple[int, ...]:
    """Return the children of a place in a binary tree of `count` places."""
    return tuple(child for child in (2 * place + 1, 2 * place + 2) if child < count)


class Reduction:
    """Moves the gradient of a commit group to the writer.

    Args:
        pool: the rollout actors.
        writer: stages the buckets.
        layout: names and shapes of the parameters.
        bucket_numbers: numbers moved at once.
        stop: checked between buckets.
        window: rounds before the window of this commit (see `GradientStore.begin`).
    """

    def __init__(
        self, pool: Pool, writer: WriterHandle, layout: ParameterLayout, bucket_numbers: int, stop: StopCheck,
        window: int,
    ) -> None:  # fmt: skip
        self._pool = pool
        self._writer = writer
        self._layout = layout
        self._bucket_numbers = bucket_numbers
        self._window = window
        self._stop = stop
        self._staging = ""

    def attempt(self, group: str, summed_by: Mapping[int, tuple[ShardKey, ...]], first: bool) -> Lost | None:
        """Stage the sum over these actors with the writer, or return what was lost.

        Args:
            group: the rounds that are summed.
            summed_by: by actor, exactly the shards that its sum must hold.
            first: nothing is committed yet, so every parameter must have been reached.

        Raises:
            GradientError: `first`, and some parameter got no gradient from anybody.
            OutputError: the writer cannot write.
            ClusterError: the writer is gone.
            Stopped: `stop` said so.
        """
        reports = []
        for actor, shards in summed_by.items():
            if actor not in self._pool.alive:
                return Lost("it is gone", (actor,))
            try:
                report = self._pool.gradient_report(actor, group, ANSWER_DEADLINE_S)
            except RayError as error:
                return Lost(first_line(error), (actor,))
            if report.shards != shards:
                cause = f"its gradient holds shards {report.shards}, {shards} were asked for"
                self._pool.remove(actor, cause)
                return Lost(cause, (actor,))
            reports.append(report)
        if first:
            check_reached(self._layout, reports)
        return self._move(group, tuple(summed_by))

    def put_in_place(self, rounds: int) -> bool:
        """Commit what is staged as the sum through `rounds` rounds.

        Returns False where the writer lost the staging. Attempt the sum again then.

        Raises:
            GradientError, NonFiniteError: the sum is invalid.
            OutputError: the writer cannot write.
            ClusterError: the writer is gone.
        """
        try:
            self._writer.commit(self._staging, rounds)
        except NotStaged:
            return False
        return True

    def _move(self, group: str, actors: tuple[int, ...]) -> Lost | None:
        while True:
            self._staging = self._writer.begin(self._window)
            try:
                self._stage(actors)
                return None
            except RayError as error:
                if self._writer.holds(self._staging):
                    return self._lost(group, actors, error)

    def _stage(self, actors: tuple[int, ...]) -> None:
        """Return once the writer has every bucket. Raises RayError when one is lost."""
        written: deque[Any] = deque()
        for place, (start, stop) in enumerate(self._layout.buckets(self._bucket_numbers)):
            if len(written) == IN_FLIGHT:
                self._wait_for(written.popleft())
            turn = place % len(actors)  # so that no actor is the root of every bucket
            written.append(self._send(start, stop, actors[turn:] + actors[:turn]))
        while written:
            self._wait_for(written.popleft())

    def _send(self, start: int, stop: int, actors: tuple[int, ...]) -> Any:
        """Start to sum and write a bucket; the reference is ready once it is on disk."""
        sums: dict[int, Any] = {}
        for place in reversed(range(len(actors))):
            below = [sums.pop(child) for child in children(place, len(actors))]
            sums[place] = self._pool.handle(actors[place]).bucket(start, stop, *below)
        return self._writer.add(self._staging, start, stop, sums[0])

    def _wait_for(self, written: Any) -> None:
        """Wait for a bucket.

        Raises RayError when an actor is lost, ProbeError when the writer refuses the bucket.
        """
        limit = time.monotonic() + BUCKET_DEADLINE_S
        done: list[Any] = []
        while not done and time.monotonic() < limit:
            refuse_if_stopped(self._stop)
            done, _ = ray.wait([written], timeout=POLL_S)
        ray.get(written, timeout=0.0 if not done else ANSWER_DEADLINE_S)

    def _lost(self, group: str, actors: tuple[int, ...], error: RayError) -> Lost:
        """Return the actors that do not answer, if any. Raises what the writer refused."""
        cause = task_error(error)
        if isinstance(cause, ProbeError):
            raise cause
        return Lost(first_line(error), tuple(actor for actor in actors if not self._answers(actor, group)))

    def _answers(self, actor: int, group: str) -> bool:
        try:
            self._pool.gradient_report(actor, group, ANSWER_DEADLINE_S)
        except RayError:
            return False
        return True
