"""Answers queries of a service or run from its published state and its fitter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ray_probe.controller.outcome.series_cache import SeriesCache
from ray_probe.controller.queue import Measurement
from ray_probe.controller.replies import BetaReply, Followed, MeasurementInfo, Status, Variance
from ray_probe.controller.state import ControllerState, summary
from ray_probe.errors import StateError, bad_value
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.comparison.change import ChangeFigure
from ray_probe.run.directory import RunDirectory
from ray_probe.run.messages import InSample
from ray_probe.run.result import Beta, Counts, Entropy, Gradient, Result
from ray_probe.run.series import Series
from ray_probe.system.json_object import JsonObject

SUMMARISED: Mapping[str, type[JsonObject]] = {"entropy": Entropy, "gradient": Gradient, "change": ChangeFigure}


class FitterQueries(Protocol):
    """Queries of the fitter, from any thread at any time."""

    def beta(self, version: int | None, /) -> Beta:
        """Returns a version of the open measurement's fit; None: the newest."""

    def variance(self) -> InSample:
        """Returns the newest fit's mean squares on its own records."""


class BackendQueries(Protocol):
    """Queries of the actors, from any thread at any time."""

    def census(self) -> Mapping[str, Any]:
        """Returns the fields of `Status` about actors and cluster."""

    @property
    def fitter(self) -> FitterQueries:
        """The fitter of the open measurement. Raises ConfigError before the first."""


class Queries:
    """Answers queries without waiting for the working thread."""

    def __init__(self, name: str, kind: str, board: ControllerState, sources: BackendQueries) -> None:
        self._name, self._kind, self._board, self._sources = name, kind, board, sources
        self._series = SeriesCache()

    def status(self) -> Status:
        """Returns the state of the service or run."""
        census, board = self._sources.census(), self._board
        with board.changed:
            queue = board.queue
            running = queue.running
            result = None if running is None else board.result(running)
            directory = board.directory or (queue.items[0].directory if queue.items else "")
            return Status(
                name=self._name, kind=self._kind, state=board.state, directory=str(directory), since=board.since,
                draining=queue.draining, problem=board.problem,
                measurement=None if running is None else self.info(running), progress=board.progress,
                shards_retried=0 if result is None else result.counts.shards_retried,
                queued=tuple(item.id for item in queue.waiting),
                ended=sum(item.finished is not None for item in queue.items), **census,
            )  # fmt: skip

    def results(self) -> tuple[MeasurementInfo, ...]:
        """Returns all measurements, oldest first."""
        with self._board.changed:
            items = self._board.queue.items
        return tuple(self.info(item) for item in items)

    def series(self) -> tuple[Series, ...]:
        """Returns the series of all measurements, by name."""
        with self._board.changed:
            items = self._board.queue.items
        return self._series.series(items)

    def result(self, identity: str | None) -> tuple[MeasurementInfo, Result | None]:
        """Returns a measurement and its result so far; None before a commit."""
        item, _ = self._at(identity)
        return self.info(item), self._board.result(item)

    def follow(self, identity: str, cursor: int) -> Followed:
        """Returns the events of a measurement after `cursor`; 0: all that are kept."""
        item, _ = self._at(identity)  # before its events, so that an ended measurement has all of them
        cursor, events = self._board.events(identity, cursor)
        return Followed(cursor, events, self.info(item), self._board.closing)

    def beta(self, version: int | None, identity: str | None) -> BetaReply:
        """Returns a version of a measurement's fit; None: the newest.

        Raises MissingError naming the versions that exist, and StateError before the first.
        """
        item, probe = self._at(identity)
        if item.policy_id is None:
            raise StateError(bad_value("ID", item.id, f"it is {item.state} and has no beta yet"))
        report = None if probe is None else self._sources.fitter.beta(version)
        if report is None or self._board.probe is not probe:  # it has ended, so the report may be of the next
            report = RunDirectory.open(Path(item.directory)).beta(version)
        return BetaReply(measurement=item.id, policy_id=item.policy_id, **vars(report))

    def variance(self, identity: str | None) -> Variance:
        """Returns advantage statistics of the committed rounds and of the newest fit."""
        item, probe = self._at(identity)
        result = self._board.result(item)
        own = None if probe is None else self._sources.fitter.variance()
        if self._board.probe is not probe:
            own = None  # it may be the next measurement's
        counts = Counts() if result is None else result.counts
        return Variance(
            measurement=item.id,
            beta_version=None if result is None else result.beta.version,
            rounds=counts.rounds,
            sequences=counts.sequences,
            tokens=counts.tokens,
            advantage_variance=None if result is None else result.advantage_variance,
            advantage_mean_square=None if result is None else result.advantage_mean_square,
            advantage_mean_square_ratio=None if result is None else result.advantage_mean_square_ratio,
            gradient=None if result is None else result.gradient,
            in_sample={} if own is None else own.mean_square,
            in_sample_version=None if own is None else own.version,
            mode=None if result is None else result.settings.mode,
            advantage_paired=None if result is None else result.advantage_paired,
            features=() if result is None else result.beta.features,
        )

    def logs(self, identity: str | None, lines: int) -> tuple[str, ...]:
        """Returns the last lines of a measurement's log; None: of the service's log."""
        board = self._board
        if identity is None and board.directory is not None:
            path = board.directory / "service.log"
        else:
            path = Path(self._at(identity)[0].directory) / "log.txt"
        if not path.exists():
            return ()
        return tuple(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def info(self, item: Measurement) -> MeasurementInfo:
        """Returns a measurement as queries show it."""
        found = dict(item.summary or summary(self._board.result(item)))
        figures = {key: kind.from_json(found[key]) for key, kind in SUMMARISED.items() if found.get(key)}
        return MeasurementInfo(
            id=item.id, checkpoint=item.checkpoint, adapter=item.adapter, state=item.state, directory=item.directory,
            submitted=item.submitted, started=item.started, finished=item.finished, cause=item.cause,
            exit_code=item.exit_code, against=item.against, series=item.series.get("name"),
            step=item.series.get("step"), tags=item.series.get("tags", {}), **(found | figures),
        )  # fmt: skip

    def _at(self, identity: str | None) -> tuple[Measurement, OfflineEntropyProbe | None]:
        """Returns a measurement, and its probe if it is running."""
        with self._board.changed:
            item = self._board.queue.get(identity)
            return item, self._board.probe if item.state == "running" else None
