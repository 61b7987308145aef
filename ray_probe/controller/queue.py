"""The queue of a service's measurements, without Ray, clock and files.

A measurement that was running when the service was lost resumes first: its committed rounds are on disk.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ray_probe.controller.sources import Source
from ray_probe.errors import MissingError, StateError, bad_value

State = Literal["queued", "running", "done", "failed", "cancelled"]
OPEN: tuple[State, ...] = ("queued", "running")


@dataclass(frozen=True)
class Measurement:
    """One checkpoint to measure, and how far it is.

    Attributes:
        id: `m0001`, counting up.
        config: the resolved configuration, plain JSON types.
        directory: the run directory.
        state: queued, running, done, failed or cancelled.
        submitted: UTC time, ISO 8601.
        started: UTC time, or None.
        finished: UTC time, or None.
        cause: why it failed or was cancelled, one line; None otherwise.
        exit_code: exit code of a `run` of it; None while it is open.
        begun: its run directory exists.
        policy_id: of checkpoint and sampling policy; None before it began.
        summary: part of its result (see `state.summary`), once it has ended.
        sources: the files that it reads, as they were when it was queued.
        pin: directory of the pinned files, or None.
    """

    id: str
    config: Mapping[str, Any]
    directory: str
    submitted: str
    state: State = "queued"
    started: str | None = None
    finished: str | None = None
    cause: str | None = None
    exit_code: int | None = None
    begun: bool = False
    policy_id: str | None = None
    summary: Mapping[str, Any] | None = None
    sources: tuple[Source, ...] = ()
    pin: str | None = None

    @property
    def checkpoint(self) -> str:
        """Directory or name of the checkpoint."""
        return str(self.config["model"]["path"])

    @property
    def against(self) -> str | None:
        """Directory of the checkpoint that it is compared with, if any."""
        against: str | None = self.config.get("compare", {}).get("against")
        return against

    @property
    def series(self) -> Mapping[str, Any]:
        """The section `series` of the configuration."""
        section: Mapping[str, Any] = self.config.get("series", {})
        return section

    @property
    def adapter(self) -> str | None:
        """Directory of the adapter, if any."""
        adapter: str | None = self.config["model"]["adapter"]
        return adapter


class Queue:
    """Measurements in the order of their submission."""

    def __init__(self, items: Iterable[Measurement] = (), draining: bool = False) -> None:
        self._items = {item.id: item for item in items}
        self.draining = draining

    @property
    def items(self) -> tuple[Measurement, ...]:
        """All measurements, oldest first."""
        return tuple(self._items.values())

    @property
    def waiting(self) -> tuple[Measurement, ...]:
        """Measurements that have not been started, next first."""
        return tuple(item for item in self._items.values() if item.state == "queued")

    @property
    def running(self) -> Measurement | None:
        """The running measurement."""
        return next((item for item in self._items.values() if item.state == "running"), None)

    def next_id(self) -> str:
        """Returns the id of the next measurement to be submitted."""
        return f"m{len(self._items) + 1:04d}"

    def submit(self, item: Measurement) -> None:
        """Appends a measurement. Raises StateError while the queue drains."""
        self.refuse_draining(item.checkpoint)
        assert item.id == self.next_id(), "ids count up"
        self._items[item.id] = item

    def refuse_draining(self, checkpoint: str) -> None:
        """Raises StateError while the queue drains."""
        if self.draining:
            raise StateError(bad_value("CHECKPOINT", checkpoint, "the service drains; undo that: drain --undo"))

    def withdraw(self, identity: str) -> None:
        """Removes the newest measurement."""
        assert identity == list(self._items)[-1], "the newest"
        del self._items[identity]

    def get(self, identity: str | None) -> Measurement:
        """Returns a measurement; None: the running one, else the last one started.

        Raises MissingError naming the last ids.
        """
        if identity is None:
            begun = [item for item in self._items.values() if item.started is not None]
            found = self.running or (begun[-1] if begun else None)
            if found is None:
                raise MissingError("ID: no measurement has been started yet; queue one: probe CHECKPOINT")
            return found
        if identity not in self._items:
            there = ", ".join(list(self._items)[-10:]) or "none yet"
            raise MissingError(bad_value("ID", identity, f"no such measurement; there are {there}"))
        return self._items[identity]

    def change(self, identity: str, **fields: Any) -> Measurement:
        """Replaces fields of a measurement; returns the new one."""
        self._items[identity] = changed = replace(self._items[identity], **fields)
        return changed

    def cancel(self, identity: str, now: str) -> Measurement:
        """Cancels a queued measurement; returns a running one unchanged.

        Its owner stops a running one. Raises StateError when it has ended.
        """
        item = self.get(identity)
        if item.state not in OPEN:
            raise StateError(
                bad_value("ID", identity, f"it is {item.state}; only what waits or runs can be cancelled")
            )
        if item.state == "queued":
            cause = "cancelled; its whole rounds are kept" if item.begun else "cancelled before it began"
            item = self.change(identity, state="cancelled", finished=now, cause=cause, exit_code=130)
        return item

    def to_json(self) -> dict[str, object]:
        """Returns plain JSON types, the inverse of `from_json`."""
        return {"draining": self.draining, "measurements": [asdict(item) for item in self._items.values()]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Queue":
        """Returns the queue of `to_json`, with a running measurement queued, first."""
        items = [
            Measurement(**item | {"sources": tuple(Source(**source) for source in item["sources"])})
            for item in raw["measurements"]
        ]
        return cls((replace(i, state="queued") if i.state == "running" else i for i in items), raw["draining"])
