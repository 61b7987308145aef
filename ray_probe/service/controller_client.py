"""The queries and commands of a client, passed on to its controller."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_probe.controller.replies import BetaReply, Followed, MeasurementInfo, Scaled, Status, Variance
from ray_probe.run.result import Result
from ray_probe.run.series import Series

if TYPE_CHECKING:
    from ray_probe.cluster.controller_handle import ControllerHandle
    from ray_probe.http.client import HttpController


class ControllerClient:
    """A client of a controller.

    Args:
        controller: the controller, as a handle of Ray's or over HTTP.
    """

    def __init__(self, controller: "ControllerHandle | HttpController") -> None:
        self._api = controller
        self.name = controller.name

    def queue(self, settings: Mapping[str, Any]) -> str:
        """Queue a measurement with these settings by dotted key; returns its id.

        Raises InputError where checkpoint or settings are wrong, OutputError where the checkpoint cannot be pinned.
        """
        return self._api.queue(settings)

    def cancel(self, measurement: str, deadline_s: float | None = None) -> MeasurementInfo:
        """Withdraw a waiting measurement, or stop the running one after whole rounds."""
        return self._api.cancel(measurement) if deadline_s is None else self._api.cancel(measurement, deadline_s)

    def drain(self, on: bool = True) -> None:
        """Accept no more measurements and finish the waiting ones; False: accept again."""
        self._api.drain(on)

    def scale(self, actors: int) -> Scaled:
        """Ask for this many rollout actors; `status` shows when they have started."""
        return self._api.scale(actors)

    def status(self, deadline_s: float | None = None) -> Status:
        """Return the status; `deadline_s` is how long to wait for the answer."""
        return self._api.status() if deadline_s is None else self._api.status(deadline_s)

    def results(self) -> tuple[MeasurementInfo, ...]:
        """Return all measurements, oldest first."""
        return self._api.results()

    def measured(self, measurement: str | None = None) -> tuple[MeasurementInfo, Result | None]:
        """Return a measurement and its result so far; None before the first round."""
        return self._api.measured(measurement)

    def follow(self, measurement: str, cursor: int, *args: Any, **options: Any) -> Followed:
        """Return a measurement's events since `cursor` (see `ControllerApi.follow`)."""
        return self._api.follow(measurement, cursor, *args, **options)

    def beta(self, version: int | None = None, measurement: str | None = None) -> BetaReply:
        """Return a version of the fitted baseline.

        Args:
            version: grows by one a round; None: the newest.
            measurement: id; None: the running one, else the newest that was started.

        Raises ConfigError that lists the existing versions or measurements.
        """
        return self._api.beta(version, measurement)

    def variance(self, measurement: str | None = None) -> Variance:
        """Return variances over whole rounds.

        Those of advantages, by mode, are in nats^2 per token.
        """
        return self._api.variance(measurement)

    def logs(self, measurement: str | None = None, lines: int = 100) -> tuple[str, ...]:
        """Return the last lines of a measurement's log, or (None) of the service's."""
        return self._api.logs(measurement, lines)

    def series(self) -> tuple[Series, ...]:
        """Return the series of the service's measurements, by name."""
        return self._api.series()
