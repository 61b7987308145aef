"""The client of a service or a run in progress, from another process."""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ray_probe.controller.replies import BetaReply, MeasurementInfo, Scaled, Status, Variance
from ray_probe.errors import (
    CancelledError,
    ClusterError,
    ConfigError,
    InputError,
    NoClusterError,
    ParityError,
    ProbeError,
    bad_value,
)
from ray_probe.run.progress import Listener
from ray_probe.run.result import Result
from ray_probe.service.discovery import find
from ray_probe.service.following import follow

if TYPE_CHECKING:
    from ray_probe.cluster.controller_actor import ControllerHandle
    from ray_probe.cluster.head.head_monitor import HeadMonitor

ANSWER_S = 20.0
STOP_EVERY_S = 0.05
CLOSE_S = 60.0


class ProbeClient:
    """A connection to a service or a run, closed at the end of its `with` block.

    A process that is connected to the same Ray cluster already, such as a trainer, keeps using its connection.

    Args:
        controller: handle of the controller.
        namespace: Ray namespace of the actors.
        connection: ends the connection.
        head: monitor of the cluster's head; None: not monitored.
        kind: service or run.
    """

    def __init__(
        self,
        controller: "ControllerHandle",
        namespace: str,
        connection: contextlib.ExitStack,
        head: "HeadMonitor | None" = None,
        kind: str = "service",
    ) -> None:
        self.controller = controller
        self.name = controller.name
        self.namespace = namespace
        self.kind = kind
        self._connection = connection
        self._head = head
        self._silent = False
        controller.look = self._refuse_lost_head

    @classmethod
    def connect(
        cls,
        address: str | None = None,
        namespace: str | None = None,
        name: str | None = None,
        kind: str | None = "service",
    ) -> "ProbeClient":
        """Connect to a service or run.

        Args:
            address: host:port of the cluster, or auto; None: from this user's registry.
            namespace: Ray namespace; None: the registry's, or `ray_probe` with an address.
            name: of the service or run; None where there is only one.
            kind: service or run, to choose without a name; None: either.

        Raises:
            ConfigError: nothing of that name is up, or several are and none is named; lists what is up.
            ClusterError: the cluster is not reachable, or refuses the token; within seconds.
        """
        with contextlib.ExitStack() as stack:
            found = find(stack, address, namespace, name, kind)
            return cls(found.controller, found.namespace, stack.pop_all(), found.head, found.kind)

    def __enter__(self) -> "ProbeClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; measurements go on."""
        self._connection.close()

    @property
    def head_lost(self) -> bool:
        """Whether the cluster's head is lost; false where it is not monitored."""
        return self._head is not None and self._head.is_lost()

    def status(self, deadline_s: float = ANSWER_S) -> Status:
        """Return the status; `deadline_s` is how long to wait for the answer."""
        return self.controller.status(deadline_s)

    def beta(self, version: int | None = None, measurement: str | None = None) -> BetaReply:
        """Return a version of the fitted baseline.

        Args:
            version: grows by one a round; None: the newest.
            measurement: id; None: the running one, else the newest that was started.

        Raises ConfigError that lists the existing versions or measurements.
        """
        return self.controller.beta(version, measurement)

    def variance(self, measurement: str | None = None) -> Variance:
        """Return variances over whole rounds.

        Those of advantages, by mode, are in nats^2 per token.
        """
        return self.controller.variance(measurement)

    def results(self) -> tuple[MeasurementInfo, ...]:
        """Return all measurements, oldest first."""
        return self.controller.results()

    def result(self, measurement: str | None = None) -> tuple[MeasurementInfo, dict[str, Any] | None]:
        """Return a measurement and its result.json so far; None before the first round."""
        info, result = self.measured(measurement)
        return info, None if result is None else result.to_json()

    def measured(self, measurement: str | None = None) -> tuple[MeasurementInfo, Result | None]:
        """Return a measurement and its result so far; None before the first round."""
        return self.controller.result(measurement)

    def logs(self, measurement: str | None = None, lines: int = 100) -> tuple[str, ...]:
        """Return the last lines of a measurement's log, or (None) of the service's."""
        return self.controller.logs(measurement, lines)

    def probe(
        self,
        checkpoint: str | Path,
        adapter: str | Path | None = None,
        prompts: str | Path | Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        snapshot: Literal["link", "copy"] | None = None,
    ) -> str:
        """Queue a measurement of a checkpoint as it is now; returns its id.

        The measurement fails where the checkpoint changes before it is measured. With a snapshot the files are pinned
        when this returns, and the directory may be overwritten, rotated away or deleted.

        Args:
            checkpoint: directory, or a hub name where the service's config allows that.
            adapter: PEFT adapter directory, or None.
            prompts: replace the service's: a file, a data set or a list.
            settings: further settings by dotted key, of model, data, batch, generation and estimator.
            snapshot: pin it in the service's directory: link (hard links, fast) or copy (for a trainer that writes
                into existing files); None: the service's `model.snapshot`.

        Raises:
            InputError: the checkpoint or a setting is wrong, or it cannot be hard-linked; nothing is queued.
            OutputError: it cannot be copied; nothing is queued.
        """
        asked: dict[str, object] = {"model.path": _place(checkpoint), "model.adapter": adapter and _place(adapter)}
        if prompts is not None:
            asked["data.prompts"] = _place(prompts) if isinstance(prompts, str | Path) else list(prompts)
        if snapshot is not None:
            asked["model.snapshot"] = snapshot
        return self.controller.probe(asked | dict(settings or {}))

    def wait(
        self,
        measurement: str,
        listener: Listener = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Follow a measurement to its end; returns its result.json (see `ended`)."""
        return self.ended(measurement, listener, stop).to_json()

    def ended(
        self,
        measurement: str,
        listener: Listener = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Result:
        """Follow a measurement to its end; returns its result.

        Args:
            measurement: id.
            listener: receives progress and notes.
            stop: returns true to end the wait by KeyboardInterrupt; the measurement goes on.

        Raises:
            ProbeError: the measurement failed, with its exit code; CancelledError when it was stopped.
            ClusterError: its service was taken down, or its controller does not answer any more.
        """
        from ray_probe.cluster.actors.calls import is_silent

        def go_on() -> None:
            if stop():
                raise KeyboardInterrupt

        try:
            follow(self.controller.follow, self.name, self.kind, measurement, listener, go_on)
        except ClusterError as error:
            self._silent = is_silent(error)
            raise
        info, result = self.measured(measurement)
        if info.state == "failed":
            kinds = {kind.exit_code: kind for kind in (InputError, ClusterError, ParityError)}
            raise kinds.get(info.exit_code or 1, ProbeError)(info.cause or "it failed")
        if info.state == "cancelled":
            raise CancelledError(f"{measurement}: {info.cause}; what it has is in {info.directory}")
        if result is None:
            raise ConfigError(bad_value("ID", measurement, f"it is {info.state} and has no result yet"))
        return result

    def stop(self, measurement: str, seconds: float) -> bool:
        """Stop a measurement and wait for its end; returns whether it ended in time."""
        deadline = time.monotonic() + seconds
        self.controller.cancel(measurement, seconds)
        while (left := deadline - time.monotonic()) > 0:
            if self.controller.follow(measurement, sys.maxsize, left).info.finished is not None:
                return True
            time.sleep(STOP_EVERY_S)
        return False

    def scale(self, actors: int) -> Scaled:
        """Ask for this many rollout actors; `status` shows when they have started."""
        return self.controller.scale(actors)

    def cancel(self, measurement: str) -> MeasurementInfo:
        """Withdraw a waiting measurement, or stop the running one after whole rounds."""
        return self.controller.cancel(measurement)

    def drain(self, on: bool = True) -> None:
        """Accept no more measurements and finish the waiting ones; False: accept again."""
        self.controller.drain(on)

    def start_error(self) -> ProbeError | None:
        """Return the error that kept the service from starting, or None."""
        return self.controller.start_error()

    def end(self, seconds: float = CLOSE_S) -> bool:
        """Stop the work after whole rounds and end the actors; returns whether in time.

        Args:
            seconds: how long the work may take to stop; 0 ends the actors at once.
        """
        from ray_probe.cluster.actors.own_actors import end_children

        in_time = False
        try:
            in_time = seconds > 0 and not self._silent and self.controller.close(seconds)
        except ClusterError:
            pass  # it does not answer; its actors are ended all the same
        finally:
            if not self.head_lost:  # else the actors are gone, and Ray would wait for the head's answer forever
                self.controller.kill()
                end_children(self.name, self.namespace)
        return in_time

    def end_quietly(self, seconds: float = CLOSE_S) -> None:
        """Call `end`, and ignore actors that are gone already."""
        with contextlib.suppress(ClusterError):
            self.end(seconds)

    def _refuse_lost_head(self) -> None:
        if self._head is not None and self._head.is_lost():
            raise NoClusterError(f"cluster: its head at {self._head.address} is gone")


def _place(path: str | Path | Sequence[str]) -> str:
    """Return an existing file's absolute path, else the name (of the hub) as it is."""
    text = str(path)
    return str(Path(text).resolve()) if Path(text).exists() else text
