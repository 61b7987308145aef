"""The handle of a controller, through which clients ask it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ray_probe.cluster.actors.calls import ArgTs, ResultT, call, call_long
from ray_probe.cluster.actors.handle import ActorHandle
from ray_probe.cluster.controller_actor import ControllerActor
from ray_probe.cluster.head.head_monitor import HeadMonitor
from ray_probe.controller.replies import BetaReply, Followed, MeasurementInfo, Scaled, Status, Variance
from ray_probe.errors import ClusterError, NoClusterError, ProbeError
from ray_probe.run.result import Result
from ray_probe.run.series import Series

if TYPE_CHECKING:
    from ray_probe.controller.measurement import Job

ANSWER_S = 20.0
KIND_S = 5.0


class ControllerHandle(ActorHandle[ControllerActor]):
    """The handle of a controller; `ProbeClient` adds a connection.

    Methods raise the controller's ProbeError, or ClusterError without an answer.

    Args:
        name: of the service or run.
        actor: Ray's handle.
        head: monitor of the cluster's head; None: not monitored.
    """

    def __init__(self, name: str, actor: ControllerActor, head: HeadMonitor | None = None) -> None:
        super().__init__(name, actor)
        self._head = head

    def monitored(self, head: HeadMonitor) -> "ControllerHandle":
        """Return a handle whose calls end once the cluster's head is lost."""
        return ControllerHandle(self.name, self.actor, head)

    def ask_kind(self) -> str | None:
        """Return "service" or "run"; None when the controller does not answer."""
        try:
            return self._call(self.actor.kind, deadline_s=KIND_S)
        except ClusterError:
            return None

    def submit(self, config: Mapping[str, Any], job: "Job", deadline_s: float) -> str:
        """Queue a run that has been checked; returns its id."""
        return self._call(self.actor.submit, config, job, deadline_s=deadline_s)

    def queue(self, settings: Mapping[str, Any]) -> str:
        """Queue a measurement with these settings; returns its id.

        Raises InputError where checkpoint or settings are wrong, OutputError where the checkpoint cannot be pinned.
        """
        return call_long(self.name, self.actor.probe, settings, alive=self.actor.pid, silent_s=ANSWER_S)

    def cancel(self, measurement: str, deadline_s: float = ANSWER_S) -> MeasurementInfo:
        """Withdraw a waiting measurement, or stop the running one after whole rounds."""
        return self._call(self.actor.cancel, measurement, deadline_s=deadline_s)

    def drain(self, on: bool = True) -> None:
        """Accept no more measurements and finish the waiting ones; False: accept again."""
        self._call(self.actor.drain, on)

    def scale(self, actors: int) -> Scaled:
        """Ask for this many rollout actors; `status` shows when they have started."""
        return self._call(self.actor.scale, actors)

    def status(self, deadline_s: float = ANSWER_S) -> Status:
        """Return the status; `deadline_s` is how long to wait for the answer."""
        return self._call(self.actor.status, deadline_s=deadline_s)

    def results(self) -> tuple[MeasurementInfo, ...]:
        """Return all measurements, oldest first."""
        return self._call(self.actor.results)

    def measured(self, measurement: str | None = None) -> tuple[MeasurementInfo, Result | None]:
        """Return a measurement and its result so far; None before the first round."""
        return self._call(self.actor.result, measurement)

    def follow(
        self, measurement: str, cursor: int, deadline_s: float = ANSWER_S, meanwhile: Callable[[], None] = lambda: None
    ) -> Followed:
        """Return a measurement's events since `cursor`.

        `meanwhile` is called twice a second during the wait.
        """
        return self._call(self.actor.follow, measurement, cursor, deadline_s=deadline_s, meanwhile=meanwhile)

    def start_error(self) -> ProbeError | None:
        """Return the error that kept the service from starting, or None."""
        return self._call(self.actor.start_error)

    def beta(self, version: int | None = None, measurement: str | None = None) -> BetaReply:
        """Return a version of the fitted baseline.

        Args:
            version: grows by one a round; None: the newest.
            measurement: id; None: the running one, else the newest that was started.

        Raises ConfigError that lists the existing versions or measurements.
        """
        return self._call(self.actor.beta, version, measurement)

    def variance(self, measurement: str | None = None) -> Variance:
        """Return variances over whole rounds.

        Those of advantages, by mode, are in nats^2 per token.
        """
        return self._call(self.actor.variance, measurement)

    def logs(self, measurement: str | None = None, lines: int = 100) -> tuple[str, ...]:
        """Return the last lines of a measurement's log, or (None) of the service's."""
        return self._call(self.actor.logs, measurement, lines)

    def series(self) -> tuple[Series, ...]:
        """Return the series of the service's measurements, by name."""
        return self._call(self.actor.series)

    def end_work(self, deadline_s: float) -> bool:
        """Stop the work after whole rounds and end the actors; returns whether in time."""
        return self._call(self.actor.close, deadline_s / 2, deadline_s=deadline_s)

    def refuse_lost_head(self) -> None:
        """Raise NoClusterError once the cluster's head is lost, where it is monitored.

        Called before a call and twice a second during the wait.
        """
        if self._head is not None and self._head.is_lost():
            raise NoClusterError(f"cluster: its head at {self._head.address} is gone")

    def _call(
        self,
        method: Callable[[*ArgTs], ResultT],
        *args: *ArgTs,
        deadline_s: float = ANSWER_S,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> ResultT:
        def look() -> None:
            self.refuse_lost_head()
            meanwhile()

        look()
        return call(self.name, method, *args, deadline_s=deadline_s, meanwhile=look)
