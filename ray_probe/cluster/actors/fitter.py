"""The fitter's actor and its handle: the node that holds the run directory has both files and ledger."""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from threadpoolctl import threadpool_limits

from ray_probe.cluster.actors.delivery import answer_of, delivery_of
from ray_probe.cluster.actors.handle import FILES_DEADLINE_S, RestartedHandle, on_this_node
from ray_probe.cluster.actors.own_actors import OwnActor
from ray_probe.core.estimator.baselines import BaselineRule, PublishedFit
from ray_probe.fitter.fitter import Counts
from ray_probe.fitter.host import FitterHost
from ray_probe.run.messages import FitterSession, InSample
from ray_probe.run.result import Beta


class FitterActor(OwnActor):
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
    ) -> FitterSession:
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
    def beta(self, version: int | None = None) -> Beta:
        """A global fit, as results show it; None: the current one. Answered while records are taken in."""
        return self._host.fitter.beta(version)

    @ray.method(concurrency_group="queries")  # type: ignore[untyped-decorator]
    def variance(self) -> InSample:
        """How well the current fit explains its own rows. Answered while records are taken in."""
        return self._host.fitter.variance()


FITTER_THREADS = {"queries": 2, "records": 16}
"""Besides its own: for what is asked meanwhile, and for deliveries that share a write to the ledger."""


class OpenFitterHandle(RestartedHandle):
    """A fitter on one measurement; what is delivered for another is not taken.

    Args:
        handle: the fitter's Ray handle.
        opening: names the measurement.
    """

    def __init__(self, handle: Any, opening: FitterSession) -> None:
        super().__init__("fitter", handle)
        self.opening = opening
        self._told: set[str] = set()

    def new_notes(self) -> list[str]:
        """What the run's log should say since it was last asked: of a death, a torn ledger, other bytes."""
        notes = [note for note in self.ask("notes") if note not in self._told]
        self._told |= set(notes)
        return notes


class FitterHandle(RestartedHandle):
    """The fitter.

    Args:
        who: what it is called in messages.
        handle: its Ray handle.
        state: file in which it keeps what it is open on; None: none.
    """

    def __init__(self, who: str, handle: Any, state: Path | None = None) -> None:
        super().__init__(who, handle)
        self._state = state

    def open_fitter(
        self, rule: BaselineRule, policy_id: str, ledger: Path, finished: Sequence[Sequence[int]] = (), run: str = ""
    ) -> OpenFitterHandle:
        """Have it own a measurement's records, rebuilt from their ledger.

        Args:
            rule: how the baseline is formed.
            policy_id: what records are marked with.
            ledger: file of accepted records.
            finished: shards of each round that a resumed run keeps.
            run: names what else records must agree on.
        """
        opening = self.ask("open", rule, policy_id, str(ledger), finished, run, deadline_s=FILES_DEADLINE_S)
        return OpenFitterHandle(self.handle, opening)

    def close(self) -> None:
        """End the actor."""
        super().close()
        if self._state is not None:
            self._state.unlink(missing_ok=True)


def fitter_actor(options: Mapping[str, Any], state: Path | None = None) -> FitterHandle:
    """Start a fitter on this node, without an environment of its own: a worker that Ray has ready becomes it at once.

    Args:
        options: further ones of `ray.remote`: a name, a lifetime.
        state: file in which it keeps what it is open on, so that Ray can make it again when it dies; None: it cannot.
    """
    remote = ray.remote(concurrency_groups=FITTER_THREADS)(FitterActor)
    own = on_this_node() | ({} if state is None else {"max_restarts": -1})
    file = None if state is None else str(state)
    return FitterHandle("fitter", remote.options(**own, **options).remote(file, secrets.token_hex(8)), state)
