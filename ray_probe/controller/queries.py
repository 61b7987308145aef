"""What a service or a run in progress answers, from what its controller has published and from its fitter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ray_probe.controller.queue import Measurement
from ray_probe.controller.replies import BetaReply, Followed, MeasurementInfo, Status, Variance
from ray_probe.controller.state import ControllerState, summary
from ray_probe.errors import ConfigError, bad_value
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.directory import RunDirectory
from ray_probe.run.messages import InSample
from ray_probe.run.result import Beta, Counts, Entropy, Gradient, Result
from ray_probe.system.json_object import JsonObject

SUMMARISED: Mapping[str, type[JsonObject]] = {"entropy": Entropy, "gradient": Gradient}


class Sources(Protocol):
    """What is asked of the actors; from any thread, at any moment."""

    def census(self) -> Mapping[str, Any]:
        """The part of `Status` that is about actors and cluster."""
        ...

    def beta_of(self, version: int | None) -> Beta:
        """A version of the open measurement's fit, from the fitter itself."""
        ...

    def in_sample(self) -> InSample:
        """The newest fit on its own records, from the fitter itself."""
        ...


class Queries:
    """Answers questions; waits for nobody's work."""

    def __init__(self, name: str, kind: str, board: ControllerState, sources: Sources) -> None:
        self._name, self._kind, self._board, self._sources = name, kind, board, sources

    def status(self) -> Status:
        """How things are."""
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
        """All measurements, oldest first."""
        with self._board.changed:
            items = self._board.queue.items
        return tuple(self.info(item) for item in items)

    def result(self, identity: str | None) -> tuple[MeasurementInfo, Result | None]:
        """A measurement, and the result of its whole rounds so far (None before the first)."""
        item, _ = self._at(identity)
        return self.info(item), self._board.result(item)

    def follow(self, identity: str, cursor: int) -> Followed:
        """What happened to a measurement after `cursor`; 0 for all that is still known."""
        item, _ = self._at(identity)  # before its events: then the last of them are in once it has ended
        cursor, events = self._board.events(identity, cursor)
        return Followed(cursor, events, self.info(item), self._board.closing)

    def beta(self, version: int | None, identity: str | None) -> BetaReply:
        """A version of a measurement's fit; None: the newest. Raises ConfigError naming the versions there are."""
        item, probe = self._at(identity)
        if item.policy_id is None:
            raise ConfigError(bad_value("ID", item.id, f"it is {item.state} and has no beta yet"))
        report = None if probe is None else self._sources.beta_of(version)
        if report is None or self._board.probe is not probe:  # it ended meanwhile: that was of the next one, maybe
            report = RunDirectory.open(Path(item.directory)).beta(version)
        return BetaReply(measurement=item.id, policy_id=item.policy_id, **vars(report))

    def variance(self, identity: str | None) -> Variance:
        """Advantage statistics of a measurement's whole rounds, and the newest fit on its own data."""
        item, probe = self._at(identity)
        result = self._board.result(item)
        own = None if probe is None else self._sources.in_sample()
        if self._board.probe is not probe:
            own = None  # of the next measurement, maybe
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
        )

    def logs(self, identity: str | None, lines: int) -> tuple[str, ...]:
        """The last lines of a measurement's log.txt; None: of the service's own log."""
        board = self._board
        if identity is None and board.directory is not None:
            path = board.directory / "service.log"
        else:
            path = Path(self._at(identity)[0].directory) / "log.txt"
        if not path.exists():
            return ()
        return tuple(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def info(self, item: Measurement) -> MeasurementInfo:
        """A measurement as it is shown."""
        found = dict(item.summary or summary(self._board.result(item)))
        figures = {key: kind.from_json(found[key]) for key, kind in SUMMARISED.items() if found[key] is not None}
        return MeasurementInfo(
            id=item.id, checkpoint=item.checkpoint, adapter=item.adapter, state=item.state, directory=item.directory,
            submitted=item.submitted, started=item.started, finished=item.finished, cause=item.cause,
            exit_code=item.exit_code, **(found | figures),
        )  # fmt: skip

    def _at(self, identity: str | None) -> tuple[Measurement, OfflineEntropyProbe | None]:
        """A measurement, and its probe where the fitter is open on it."""
        with self._board.changed:
            item = self._board.queue.get(identity)
            return item, self._board.probe if item.state == "running" else None
