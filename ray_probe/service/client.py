"""Asking a service, or a run in progress, from another process: `ProbeClient.connect().beta()`."""

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
    from ray_probe.cluster.head.head_monitor import HeadMonitor

ANSWER_S = 20.0
STOP_EVERY_S = 0.05
CLOSE_S = 60.0


class ProbeClient:
    """A connection to a service or a run; a context manager that ends it. Every answer is a frozen, typed reply.

    In a process that is connected to the same Ray cluster already, a trainer's say, that connection is used and kept.
    """

    def __init__(
        self,
        controller: Any,
        name: str,
        namespace: str,
        connection: contextlib.ExitStack,
        head: "HeadMonitor | None" = None,
        kind: str = "service",
    ) -> None:
        self._controller = controller
        self._head = head
        self._silent = False
        self.kind = kind
        self.name = name
        self.namespace = namespace
        self._connection = connection

    @classmethod
    def connect(
        cls,
        address: str | None = None,
        namespace: str | None = None,
        name: str | None = None,
        kind: str | None = "service",
    ) -> "ProbeClient":
        """Connect to what is live.

        Args:
            address: host:port of the cluster, or auto; None: where this user's registry says.
            namespace: Ray namespace; None: the registry's, or `ray_probe` with an address.
            name: of the service or run; None where there is only one.
            kind: of what is looked for without a name: service or run; None: either.

        Raises:
            ConfigError: nothing of that name, or several without one; names what there is.
            ClusterError: the cluster is not reachable, or refuses the token; within seconds.
        """
        with contextlib.ExitStack() as stack:
            found = find(stack, address, namespace, name, kind)
            return cls(found.controller, found.name, found.namespace, stack.pop_all(), found.head, found.kind)

    def __enter__(self) -> "ProbeClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; what was asked goes on."""
        self._connection.close()

    @property
    def head_lost(self) -> bool:
        """The cluster's head is gone, and all that it had with it; known where it is watched."""
        return self._head is not None and self._head.is_lost()

    def status(self, deadline_s: float = ANSWER_S) -> Status:
        """How it is doing; `deadline_s` is how long to wait for the answer."""
        status: Status = self._ask("status", deadline_s=deadline_s)
        return status

    def beta(self, version: int | None = None, measurement: str | None = None) -> BetaReply:
        """A version of the fitted baseline.

        Args:
            version: counts up by one a round; None: the newest.
            measurement: id; None: the one at work, else the newest that was started.

        Raises ConfigError naming the versions or measurements that exist.
        """
        beta: BetaReply = self._ask("beta", version, measurement)
        return beta

    def variance(self, measurement: str | None = None) -> Variance:
        """Advantage statistics by mode, nats^2 per token, and the gradient's, of the whole rounds so far."""
        variance: Variance = self._ask("variance", measurement)
        return variance

    def results(self) -> tuple[MeasurementInfo, ...]:
        """All measurements, oldest first."""
        results: tuple[MeasurementInfo, ...] = self._ask("results")
        return results

    def result(self, measurement: str | None = None) -> tuple[MeasurementInfo, dict[str, Any] | None]:
        """A measurement, and the object of result.json of its whole rounds so far; None before the first."""
        info, result = self.measured(measurement)
        return info, None if result is None else result.to_json()

    def measured(self, measurement: str | None = None) -> tuple[MeasurementInfo, Result | None]:
        """Return a measurement and the result of its whole rounds so far; None before the first."""
        found: tuple[MeasurementInfo, Result | None] = self._ask("result", measurement)
        return found

    def logs(self, measurement: str | None = None, lines: int = 100) -> tuple[str, ...]:
        """The last lines of a measurement's log.txt; None: of the service's own log."""
        found: tuple[str, ...] = self._ask("logs", measurement, lines)
        return found

    def probe(
        self,
        checkpoint: str | Path,
        adapter: str | Path | None = None,
        prompts: str | Path | Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        snapshot: Literal["link", "copy"] | None = None,
    ) -> str:
        """Queue a measurement of a checkpoint as it is now; returns its id.

        What changes before it is measured fails it. With a snapshot the files are pinned when this returns, and the
        directory may be overwritten, rotated away or deleted.

        Args:
            checkpoint: directory, or a hub name where the service's config allows that.
            adapter: PEFT adapter directory, or None for none.
            prompts: others than the service's: a file, a data set or a list.
            settings: further settings by dotted key, of model, data, batch, generation and estimator.
            snapshot: pin it in the service's directory: link (hard links, at once) or copy (for a trainer that writes
                into the files that are there); None: as the service's configuration says (`model.snapshot`).

        Raises:
            InputError: what is wrong with the checkpoint or the settings, or it cannot be hard-linked.
            OutputError: it cannot be copied. Nothing is queued then.
        """
        asked: dict[str, object] = {"model.path": _place(checkpoint), "model.adapter": adapter and _place(adapter)}
        if prompts is not None:
            asked["data.prompts"] = _place(prompts) if isinstance(prompts, str | Path) else list(prompts)
        if snapshot is not None:
            asked["model.snapshot"] = snapshot
        from ray_probe.cluster.actors.calls import ask_for_long

        identity: str = ask_for_long(
            self._controller, self.name, "probe", asked | dict(settings or {}), silent_s=ANSWER_S
        )
        return identity

    def wait(
        self,
        measurement: str,
        listener: Listener = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Follow a measurement to its end; returns the object of result.json (see `ended`)."""
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
            listener: told of progress and notes.
            stop: true to follow no longer, by KeyboardInterrupt; the measurement goes on.

        Raises:
            ProbeError: what it failed of, with its exit code; CancelledError when somebody stopped it.
            ClusterError: its service was taken down, or its controller does not answer any more.
        """
        from ray_probe.cluster.actors.calls import is_silent

        def go_on() -> None:
            if stop():
                raise KeyboardInterrupt

        try:
            follow(self._ask, self.name, self.kind, measurement, listener, go_on)
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
        """Stop a measurement and wait for its end; returns whether it came in time."""
        deadline = time.monotonic() + seconds
        self._ask("cancel", measurement, deadline_s=seconds)
        while (left := deadline - time.monotonic()) > 0:
            if self._ask("follow", measurement, sys.maxsize, deadline_s=left).info.finished is not None:
                return True
            time.sleep(STOP_EVERY_S)
        return False

    def scale(self, actors: int) -> Scaled:
        """Ask for so many rollout actors from now on; `status` tells when they are there."""
        scaled: Scaled = self._ask("scale", actors)
        return scaled

    def cancel(self, measurement: str) -> MeasurementInfo:
        """Take back a measurement that waits, or stop the one at work with its whole rounds kept."""
        info: MeasurementInfo = self._ask("cancel", measurement)
        return info

    def drain(self, on: bool = True) -> None:
        """Have it take nothing new and work off what waits; or, with False, take on again."""
        self._ask("drain", on)

    def start_error(self) -> ProbeError | None:
        """What kept the service from starting, in its own type; None as long as nothing did."""
        error: ProbeError | None = self._ask("start_error")
        return error

    def end(self, seconds: float = CLOSE_S) -> bool:
        """Stop the work, whole rounds kept, and end all of its actors; returns whether that was in time.

        Args:
            seconds: how long it has to stop by itself; 0 ends its actors at once.
        """
        from ray_probe.cluster.actors.calls import kill
        from ray_probe.cluster.actors.own_actors import end_children

        in_time = False
        try:
            in_time = seconds > 0 and not self._silent and self._ask("close", seconds / 2, deadline_s=seconds)
        except ClusterError:
            pass  # it does not answer: its actors are ended all the same
        finally:
            if not self.head_lost:  # else nobody is left to end them, and Ray would wait for its answer for ever
                kill(self._controller)
                end_children(self.name, self.namespace)
        return in_time

    def end_quietly(self, seconds: float = CLOSE_S) -> None:
        """`end`, where it does not matter that the actors have gone already."""
        with contextlib.suppress(ClusterError):
            self.end(seconds)

    def _refuse_lost_head(self) -> None:
        if self._head is not None and self._head.is_lost():
            raise NoClusterError(f"cluster: its head at {self._head.address} is gone")

    def _ask(
        self, method: str, *args: Any, deadline_s: float = ANSWER_S, meanwhile: Callable[[], None] = lambda: None
    ) -> Any:
        from ray_probe.cluster.actors.calls import ask

        def look() -> None:
            self._refuse_lost_head()
            meanwhile()

        look()
        return ask(self._controller, self.name, method, *args, deadline_s=deadline_s, meanwhile=look)


def _place(path: str | Path | Sequence[str]) -> str:
    """An absolute path where there is something, else the name as it is: a hub name, a data set."""
    text = str(path)
    return str(Path(text).resolve()) if Path(text).exists() else text
