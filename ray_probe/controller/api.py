"""The interface of a controller, the same through Ray and through HTTP."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ray_probe.controller.replies import BetaReply, Followed, MeasurementInfo, Scaled, Status, Variance
from ray_probe.run.result import Result
from ray_probe.run.series import Series


class ControllerApi(Protocol):
    """What a client asks of a controller.

    Methods raise the controller's ProbeError, or ClusterError without an answer.
    """

    @property
    def name(self) -> str:
        """Name of the service or run."""

    def queue(self, settings: Mapping[str, Any], /) -> str:
        """Queue a measurement with these settings by dotted key; returns its id."""

    def cancel(self, measurement: str, deadline_s: float = ..., /) -> MeasurementInfo:
        """Withdraw a waiting measurement, or stop the running one after whole rounds."""

    def drain(self, on: bool = True, /) -> None:
        """Accept no more measurements and finish the waiting ones; False: accept again."""

    def scale(self, actors: int, /) -> Scaled:
        """Ask for this many rollout actors."""

    def status(self, deadline_s: float = ..., /) -> Status:
        """Return the status."""

    def results(self) -> tuple[MeasurementInfo, ...]:
        """Return all measurements, oldest first."""

    def measured(self, measurement: str | None = None, /) -> tuple[MeasurementInfo, Result | None]:
        """Return a measurement and its result so far; None before the first round."""

    def follow(
        self, measurement: str, cursor: int, deadline_s: float = ..., meanwhile: Callable[[], None] = ..., /
    ) -> Followed:
        """Return a measurement's events since `cursor`.

        `meanwhile` is called twice a second during the wait.
        """

    def beta(self, version: int | None = None, measurement: str | None = None, /) -> BetaReply:
        """Return a version of the fitted baseline."""

    def variance(self, measurement: str | None = None, /) -> Variance:
        """Return variances over whole rounds."""

    def logs(self, measurement: str | None = None, lines: int = ..., /) -> tuple[str, ...]:
        """Return the last lines of a measurement's log, or (None) of the service's."""

    def series(self) -> tuple[Series, ...]:
        """Return the series of the service's measurements, by name."""
