"""The client of a service or a run in progress, through Ray or HTTP.

Importing it, and a connection over HTTP, import no Ray.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ray_probe.controller.replies import MeasurementInfo
from ray_probe.errors import (
    CancelledError,
    ClusterError,
    ConfigError,
    InputError,
    ParityError,
    ProbeError,
    bad_value,
)
from ray_probe.http.client import HttpController, is_url
from ray_probe.run.progress import Listener
from ray_probe.run.result import Result
from ray_probe.service.controller_client import ControllerClient
from ray_probe.service.following import follow

if TYPE_CHECKING:
    from ray_probe.cluster.controller_handle import ControllerHandle
    from ray_probe.cluster.head.head_monitor import HeadMonitor

STOP_EVERY_S = 0.05
CLOSE_S = 60.0


class ProbeClient(ControllerClient):
    """A connection to a service or a run, closed at the end of its `with` block.

    A process that is connected to the same Ray cluster already, such as a trainer, keeps using its connection. Methods
    raise the controller's ProbeError, or ClusterError without an answer.

    Args:
        controller: the controller, as a handle of Ray's or over HTTP.
        namespace: Ray namespace of the actors.
        connection: ends the connection.
        head: monitor of the cluster's head; None: not monitored.
        kind: service or run.
    """

    def __init__(
        self,
        controller: "ControllerHandle | HttpController",
        namespace: str,
        connection: contextlib.ExitStack,
        head: "HeadMonitor | None" = None,
        kind: str = "service",
    ) -> None:
        if head is not None and not isinstance(controller, HttpController):
            controller = controller.monitored(head)
        super().__init__(controller)
        self.namespace = namespace
        self.kind = kind
        self._connection = connection
        self._head = head
        self._silent = False

    @classmethod
    def connect(
        cls,
        address: str | None = None,
        namespace: str | None = None,
        name: str | None = None,
        kind: str | None = "service",
        token: str | None = None,
    ) -> "ProbeClient":
        """Connect to a service or run.

        Args:
            address: host:port of the cluster, or auto, or a URL that `ray-probe serve` prints; None: from this user's
                registry.
            namespace: Ray namespace; None: the registry's, or `ray_probe` with an address.
            name: of the service or run; None where there is only one.
            kind: service or run, to choose without a name; None: either.
            token: of a URL without one; None: that in RAY_PROBE_TOKEN.

        Raises:
            ConfigError: nothing of that name is up, or several are and none is named; lists what is up.
            ClusterError: the cluster is not reachable, or refuses the token; within seconds.
        """
        if address is not None and is_url(address):
            over = HttpController(address, token)
            return cls(over, over.namespace, contextlib.ExitStack(), kind=over.kind)
        if token is not None:
            raise ConfigError("token: belongs to a URL, http://HOST:PORT; leave it out, or give the URL as the address")
        from ray_probe.service.discovery import find

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

    def result(self, measurement: str | None = None) -> tuple[MeasurementInfo, dict[str, Any] | None]:
        """Return a measurement and its result.json so far; None before the first round."""
        info, result = self.measured(measurement)
        return info, None if result is None else result.to_json()

    def probe(
        self,
        checkpoint: str | Path,
        adapter: str | Path | None = None,
        prompts: str | Path | Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        snapshot: Literal["link", "copy"] | None = None,
        against: str | Path | None = None,
        against_adapter: str | Path | None = None,
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
            against: compare with this checkpoint: measure the change of entropy from it; None: take the gradient.
            against_adapter: PEFT adapter directory on `against`, or None.

        Raises:
            InputError: the checkpoint or a setting is wrong, or it cannot be hard-linked; nothing is queued.
            OutputError: it cannot be copied; nothing is queued.
        """
        asked: dict[str, object] = {"model.path": _place(checkpoint), "model.adapter": adapter and _place(adapter)}
        if against is not None:
            asked |= {"compare.against": _place(against)}
            asked |= {"compare.adapter": against_adapter and _place(against_adapter)}
        if prompts is not None:
            asked["data.prompts"] = _place(prompts) if isinstance(prompts, str | Path) else list(prompts)
        if snapshot is not None:
            asked["model.snapshot"] = snapshot
        return self.queue(asked | dict(settings or {}))

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
        def go_on() -> None:
            if stop():
                raise KeyboardInterrupt

        try:
            follow(self.follow, self.name, self.kind, measurement, listener, go_on)
        except ClusterError as error:
            if error.__cause__ is not None:  # of Ray's
                from ray_probe.cluster.actors.calls import is_silent

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
        self.cancel(measurement, seconds)
        while (left := deadline - time.monotonic()) > 0:
            if self.follow(measurement, sys.maxsize, left).info.finished is not None:
                return True
            time.sleep(STOP_EVERY_S)
        return False

    def end(self, seconds: float = CLOSE_S) -> bool:
        """Stop the work after whole rounds and end the actors; returns whether in time.

        Args:
            seconds: how long the work may take to stop; 0 ends the actors at once.
        """
        controller, in_time = self._of_ray("end"), False
        from ray_probe.cluster.actors.own_actors import end_children, end_server

        try:
            in_time = seconds > 0 and not self._silent and controller.end_work(seconds)
        except ClusterError:
            pass  # it does not answer; its actors are ended all the same
        finally:
            if not self.head_lost:  # else the actors are gone, and Ray would wait for the head's answer forever
                controller.kill()
                end_server(self.name, self.namespace)
                end_children(self.name, self.namespace)
        return in_time

    def end_quietly(self, seconds: float = CLOSE_S) -> None:
        """Call `end`, and ignore actors that are gone already."""
        with contextlib.suppress(ClusterError):
            self.end(seconds)

    def start_error(self) -> ProbeError | None:
        """Return the error that kept the service from starting, or None."""
        return self._of_ray("start_error").start_error()

    def pid(self) -> int:
        """Return the id of the controller's process."""
        return self._of_ray("pid").pid()

    def _of_ray(self, method: str) -> "ControllerHandle":
        if isinstance(self._api, HttpController):
            raise ConfigError(f"{method}: works through Ray alone; call it on a node of the service's cluster")
        return self._api


def _place(path: str | Path | Sequence[str]) -> str:
    """Return an existing file's absolute path, else the name (of the hub) as it is."""
    text = str(path)
    return str(Path(text).resolve()) if Path(text).exists() else text
