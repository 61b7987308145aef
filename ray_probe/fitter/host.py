"""The fitter of one measurement after another; a restarted process restores it.

The ledger holds all that the fitter knows. A small state file names the ledger and the session's token. So callers can
retry any call after a restart, and get the answer that the first process would have given.
"""

import contextlib
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ray_probe.core.estimator.baselines import BaselineRule
from ray_probe.errors import ConfigError, ProbeError, RecordError
from ray_probe.fitter.fitter import Fitter
from ray_probe.fitter.shared_write import GroupCommit
from ray_probe.run.messages import Delivery, FitterSession, Receipt, shard_label
from ray_probe.system.digests import sealed, unsealed
from ray_probe.system.files import write_atomically, writing


class FitterHost:
    """Owns the fitter of the open measurement. Many threads may deliver to it.

    Args:
        state: file that names the open measurement; None: a restart loses it.
        owner: identifies the actor across restarts. State written by another owner is ignored.
    """

    def __init__(self, state: Path | None = None, owner: str = "") -> None:
        self._state = state
        self._owner = owner
        self._opening: FitterSession | None = None
        self._fitter: Fitter | None = None
        self._problem: ProbeError | None = None
        self._died: tuple[str, ...] = ()
        self._alone = threading.RLock()
        self._together = GroupCommit(self._accept_all)
        if state is not None and state.exists():
            self._restore(state)

    def open(
        self, rule: BaselineRule, policy_id: str, ledger: Path, finished: Sequence[Sequence[int]], run: str = ""
    ) -> FitterSession:
        """Open a measurement; returns what deliveries need. Arguments as `Fitter`.

        Raises:
            ProbeError: the ledger or the state file cannot be used; no measurement is open then.
        """
        with self._alone:
            self._opening, self._problem, self._died = None, None, ()
            if self._fitter is not None:
                self._fitter.close()
            self._forget()
            self._fitter = Fitter(rule, policy_id, ledger, finished, run)
            opening = FitterSession(secrets.token_hex(8))
            about = {"opening": asdict(opening), "policy_id": policy_id, "ledger": str(ledger), "run": run}
            self._remember(about, rule)
            self._opening = opening
            return opening

    @property
    def fitter(self) -> Fitter:
        """The fitter of the open measurement.

        Raises:
            RecordError: no measurement is open.
            ProbeError: a restart could not restore it.
        """
        if self._problem is not None:
            raise self._problem
        if self._fitter is None:
            raise RecordError("fitter: no measurement is open")
        return self._fitter

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the run's log."""
        return (*self._died, *self.fitter.notes)

    @contextlib.contextmanager
    def alone(self) -> Iterator[Fitter]:
        """Yields the fitter while no record is accepted. Raises as `fitter`."""
        with self._alone:
            yield self.fitter

    def accept(self, session: FitterSession, delivery: Delivery) -> Receipt:
        """Take in a shard's record.

        Records that arrive while the ledger is written share the next write.

        Raises:
            RecordError: the session is closed, or the record is refused (see `Fitter.accept`).
        """
        return self._together((session, delivery))

    def _accept_all(self, brought: Sequence[tuple[FitterSession, Delivery]]) -> list[Receipt | Exception]:
        with self.alone() as fitter:
            current = [self._opening is not None and opening.id == self._opening.id for opening, _ in brought]
            taken = iter(
                fitter.accept_all([delivery for (_, delivery), own in zip(brought, current, strict=True) if own])
            )
            return [
                next(taken) if own else _is_late(delivery) for (_, delivery), own in zip(brought, current, strict=True)
            ]

    def _restore(self, state: Path) -> None:
        """Restores the earlier process's state; errors are raised on the next call."""
        # Ray would hide what a constructor raises.
        try:
            left = unsealed(state.read_bytes())
        except (OSError, ValueError) as error:
            self._problem = ConfigError(f"{state}: cannot be read ({error}); go on with run --resume")
            return
        if left["owner"] != self._owner:
            return
        rule = BaselineRule(**(left["rule"] | {"features": tuple(left["rule"]["features"])}))
        try:
            self._fitter = Fitter(rule, left["policy_id"], Path(left["ledger"]), None, left["run"])
        except ProbeError as error:
            self._problem = error
            return
        self._opening = FitterSession(**left["opening"])
        version, openings = self._fitter.current.version, self._fitter.counts.openings
        self._died = (f"fitter: restored from its ledger, at version {version} (opening {openings})",)

    def _remember(self, about: Mapping[str, object], rule: BaselineRule) -> None:
        if self._state is not None:
            state = {**about, "owner": self._owner, "rule": asdict(rule)}
            write_atomically(self._state, sealed(state), private=True)

    def _forget(self) -> None:
        if self._state is not None:
            with writing(self._state):
                self._state.unlink(missing_ok=True)


def _is_late(delivery: Delivery) -> RecordError:
    return RecordError(f"record: {shard_label(delivery.round, delivery.shard)} belongs to an earlier measurement")
