"""The fitter's actor, on the node that holds the run directory, and its handle."""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from threadpoolctl import threadpool_limits

from ray_probe.cluster.actors.calls import in_group, send
from ray_probe.cluster.actors.handle import ANSWER_DEADLINE_S, FILES_DEADLINE_S, RestartedHandle, on_this_node
from ray_probe.cluster.actors.own_actors import OwnActor
from ray_probe.core.estimator.baselines import BaselineRule
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.fitter.fitter import Counts
from ray_probe.fitter.host import FitterHost
from ray_probe.run.messages import Delivery, FitterSession, InSample, Receipt
from ray_probe.run.result import Beta

QUERY_DEADLINE_S = 10.0
FITTER_THREADS = {"queries": 2, "records": 16}
"""Threads by concurrency group, beside the actor's own: queries during a fit, and deliveries that share a write."""


class FitterActor(OwnActor):
    """Owns the records and fits of one measurement after another.

    A restarted process resumes the open measurement from its ledger. All methods are idempotent. The process imports
    numpy only, so that it starts fast.

    Args:
        state: file that names the open measurement; None: a restart loses it.
        owner: identifies the actor in that file across restarts.
    """

    def __init__(self, state: str | None = None, owner: str = "") -> None:
        threadpool_limits(limits=1)
        self._host = FitterHost(None if state is None else Path(state), owner)

    def open(
        self, rule: BaselineRule, policy_id: str, ledger: str, finished: Sequence[Sequence[int]], run: str = ""
    ) -> FitterSession:
        """Resume from a ledger; returns the session that deliveries name."""
        return self._host.open(rule, policy_id, Path(ledger), finished, run)

    @in_group("queries")
    def pid(self) -> int:
        """Return the id of this process; answered during a fit."""
        return super().pid()

    @in_group("records")
    def accept(self, session: FitterSession, delivery: Delivery) -> Receipt:
        """Take in a shard's record; concurrent deliveries share a write.

        Raises RecordError for a closed session.
        """
        return self._host.accept(session, delivery)

    def close_round(self, round_number: int, shards: Sequence[int], since: int) -> PublishedFit:
        """Fit; returns the fit that the round's gradients use."""
        with self._host.alone() as fitter:
            return fitter.close_round(round_number, shards, since).for_broadcast()

    def current(self) -> PublishedFit:
        """Return the newest fit."""
        with self._host.alone() as fitter:
            return fitter.current.for_broadcast()

    def counts(self) -> Counts:
        """Return the counts of records so far."""
        with self._host.alone() as fitter:
            return fitter.counts

    def notes(self) -> tuple[str, ...]:
        """Return the lines for the run's log."""
        return self._host.notes

    @in_group("queries")
    def beta(self, version: int | None = None) -> Beta:
        """Return a global fit as results show it, also during a fit."""
        return self._host.fitter.beta(version)

    @in_group("queries")
    def variance(self) -> InSample:
        """Return how well the current fit explains its own rows, also during a fit."""
        return self._host.fitter.variance()


class FitterHandle(RestartedHandle[FitterActor]):
    """The handle of the fitter; every call outlasts a restart of the actor.

    Args:
        actor: Ray's handle.
        state: file that names the open measurement, removed by `kill`; None: the actor keeps none.
    """

    def __init__(self, actor: FitterActor, state: Path | None = None) -> None:
        super().__init__("fitter", actor)
        self._state = state
        self._noted: set[str] = set()
        self.session: FitterSession | None = None

    def open(
        self, rule: BaselineRule, policy_id: str, ledger: Path, finished: Sequence[Sequence[int]] = (), run: str = ""
    ) -> FitterSession:
        """Open a measurement, with its records from the ledger, and end the last one.

        Args:
            rule: how the baseline is formed.
            policy_id: marks the records.
            ledger: file of accepted records.
            finished: shards of each round that a resumed run keeps.
            run: plan id, which the records must agree on too.
        """
        self._noted = set()
        self.session = self._call(
            self.actor.open, rule, policy_id, str(ledger), finished, run, deadline_s=FILES_DEADLINE_S
        )
        return self.session

    def accept(self, session: FitterSession, delivery: Delivery, deadline_s: float = ANSWER_DEADLINE_S) -> Receipt:
        """Deliver a shard's record.

        Raises ProbeError where the fitter refuses the record or cannot write it.
        """
        return self._call(self.actor.accept, session, delivery, deadline_s=deadline_s)

    def close_round(self, round_number: int, shards: Sequence[int], since: int) -> PublishedFit:
        """Fit these shards' records; returns the fit that the round's gradients use.

        Args:
            round_number: the open round.
            shards: shards whose record counts.
            since: first round that is not committed.
        """
        return self._call(self.actor.close_round, round_number, shards, since)

    def current(self) -> PublishedFit:
        """Return the newest fit."""
        return self._call(self.actor.current)

    def counts(self) -> Counts:
        """Return the counts of records so far."""
        return self._call(self.actor.counts)

    def new_notes(self) -> list[str]:
        """Return the lines for the run's log that no earlier call returned since `open`."""
        notes = [note for note in self._call(self.actor.notes) if note not in self._noted]
        self._noted |= set(notes)
        return notes

    def beta(self, version: int | None = None, deadline_s: float = QUERY_DEADLINE_S) -> Beta:
        """Return a global fit as results show it; None: the current one."""
        return self._call(self.actor.beta, version, deadline_s=deadline_s)

    def variance(self, deadline_s: float = QUERY_DEADLINE_S) -> InSample:
        """Return how well the current fit explains its own rows."""
        return self._call(self.actor.variance, deadline_s=deadline_s)

    def heartbeat(self) -> Any:
        """Ask whether the actor answers; returns Ray's reference to the answer."""
        return send(self.actor.pid)

    def restart(self) -> None:
        """Kill the actor's process; Ray restarts it."""
        ray.kill(self.actor, no_restart=False)

    def kill(self) -> None:
        """End the actor for good, and remove its state file."""
        super().kill()
        if self._state is not None:
            self._state.unlink(missing_ok=True)


def fitter_actor(options: Mapping[str, Any], state: Path | None = None) -> FitterHandle:
    """Start a fitter on this node.

    Args:
        options: further options of `ray.remote`: a name, a lifetime.
        state: file that names the open measurement, so that Ray can restart the actor; None: no restarts.
    """
    # Without a runtime environment of its own: an idle worker of Ray becomes the fitter at once.
    remote = ray.remote(concurrency_groups=FITTER_THREADS)(FitterActor)
    own = on_this_node() | ({} if state is None else {"max_restarts": -1})
    file = None if state is None else str(state)
    return FitterHandle(remote.options(**own, **options).remote(file, secrets.token_hex(8)), state)
