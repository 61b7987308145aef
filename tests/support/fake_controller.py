"""A controller of real replies without work behind them."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray_probe.controller.replies import BetaReply, Followed, MeasurementInfo, Scaled, Status, Variance
from ray_probe.errors import ConfigError, MissingError, StateError
from ray_probe.run.progress import Progress
from ray_probe.run.result import Result
from ray_probe.run.series import Series, SeriesPoint
from support.replies import a_beta, a_progress, a_status, a_variance, an_info
from support.results import a_result

FIRST = "m0003"


class FakeController:
    """Answers as a service with one running measurement; `queue` adds others.

    Attributes:
        asked: names of the methods that were called, with their arguments.
        error: raised by every method, or None.
        events: of the first measurement.
        before_queue: called by `queue`.
    """

    name = "demo"

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.before_queue: Callable[[], object] = lambda: None
        self.items = {FIRST: an_info()}
        self.state = a_status()
        self.events: list[Progress] = [a_progress()]
        self._lock = threading.Lock()

    def queue(self, settings: Mapping[str, Any]) -> str:
        self._ask("queue", dict(settings))
        self.before_queue()
        if settings.get("model.path") == "/nowhere":
            raise ConfigError("model.path: got '/nowhere'; there is no such directory; name a checkpoint")
        with self._lock:
            identity = f"m{len(self.items) + 3:04d}"
            item = replace(an_info(), id=identity, state="queued", checkpoint=str(settings.get("model.path", "own")))
            self.items[identity] = item
        return identity

    def cancel(self, measurement: str, deadline_s: float = 1.0) -> MeasurementInfo:
        self._ask("cancel", measurement)
        item = self._item(measurement)
        if item.finished is not None:
            raise StateError(f"ID: got {measurement!r}; it is {item.state}; only what waits or runs can be cancelled")
        return self.end(measurement, "cancelled")

    def drain(self, on: bool = True) -> None:
        self._ask("drain", on)
        self.state = replace(self.state, draining=on)

    def scale(self, actors: int) -> Scaled:
        self._ask("scale", actors)
        return Scaled(actors, 2, 4, ("requested",))

    def status(self, deadline_s: float = 1.0) -> Status:
        self._ask("status")
        return self.state

    def results(self) -> tuple[MeasurementInfo, ...]:
        self._ask("results")
        return tuple(self.items.values())

    def measured(self, measurement: str | None = None) -> tuple[MeasurementInfo, Result | None]:
        self._ask("measured", measurement)
        found = self._item(measurement or FIRST)
        return found, Result.from_json(a_result()) if found.id == FIRST else None

    def follow(self, measurement: str, cursor: int, *args: Any, **options: Any) -> Followed:
        self._ask("follow", measurement, cursor)
        events = tuple(self.events[cursor:])
        return Followed(cursor + len(events), events, self._item(measurement))

    def beta(self, version: int | None = None, measurement: str | None = None) -> BetaReply:
        self._ask("beta", version, measurement)
        if version not in (None, 4):
            raise MissingError(f"version: got {version}; there are versions 4 to 4")
        return a_beta()

    def variance(self, measurement: str | None = None) -> Variance:
        self._ask("variance", measurement)
        return a_variance()

    def logs(self, measurement: str | None = None, lines: int = 100) -> tuple[str, ...]:
        self._ask("logs", measurement, lines)
        return ("one", "two ±")[-lines:]

    def series(self) -> tuple[Series, ...]:
        self._ask("series")
        return (Series(name="grpo", points=(SeriesPoint(step=5, checkpoint="/c/5", measurements=(FIRST,)),)),)

    def end(self, measurement: str, state: str = "done") -> MeasurementInfo:
        """End a measurement, as the controller does."""
        item = replace(self.items[measurement], state=state, finished="2026-05-01T12:10:00+00:00")
        self.items[measurement] = item
        self.state = replace(self.state, ended=self.state.ended + 1)
        return item

    def _item(self, measurement: str) -> MeasurementInfo:
        if measurement not in self.items:
            raise MissingError(f"ID: got {measurement!r}; no such measurement; there are {', '.join(self.items)}")
        return self.items[measurement]

    def _ask(self, *call: Any) -> None:
        self.asked.append(call)
        if self.error is not None:
            raise self.error
