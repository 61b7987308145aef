"""Follows a measurement to its end, or to the end of its service."""

import time
from collections.abc import Callable

from ray_probe.controller.replies import Followed
from ray_probe.errors import ClusterError, NoClusterError
from ray_probe.run.progress import Listener

FOLLOW_EVERY_S = 0.25
SILENT_S = 45.0  # a head is given up sooner; Ray ends a process whose cluster has been silent for 60 s

Ask = Callable[..., Followed]


def follow(
    ask: Ask, name: str, kind: str, measurement: str, listener: Listener, go_on: Callable[[], None] = lambda: None
) -> None:
    """Returns once a measurement has ended.

    Args:
        ask: `ProbeClient.follow`.
        name: of the service or run.
        kind: service or run.
        measurement: id.
        listener: called with progress and notes.
        go_on: called at least once a second; may raise to end the wait.

    Raises:
        NoClusterError: the head of the cluster is gone.
        ClusterError: the service or run was ended, or its controller has not answered for `SILENT_S` seconds.
        ProbeError: what the controller raised.
    """
    cursor, heard = 0, time.monotonic()
    while True:
        try:
            left_s = heard + SILENT_S - time.monotonic()
            followed = ask(measurement, cursor, deadline_s=left_s, meanwhile=go_on)
        except NoClusterError:
            raise
        except ClusterError as error:  # Ray restarts a service's controller that died
            refuse_gone(error, name, kind, measurement)
            if time.monotonic() - heard >= SILENT_S:
                raise _silent(name, kind, measurement) from error.__cause__
        else:
            cursor, heard = followed.cursor, time.monotonic()
            for event in followed.events:
                listener(event)
            if followed.info.finished is not None:
                return
            go_on()
            if followed.closing:
                raise _ended(name, kind, followed)
        time.sleep(FOLLOW_EVERY_S)


def refuse_gone(error: ClusterError, name: str, kind: str, measurement: str) -> None:
    """Raises ClusterError if Ray does not restart the controller."""
    if error.__cause__ is None:  # over HTTP: the server comes back, or `follow` gives it up
        return
    from ray_probe.cluster.actors.calls import is_gone

    if not is_gone(error):
        return
    if kind == "run":
        raise error
    raise ClusterError(f"service {name!r} was taken down; {_goes_on(name, measurement)}") from error.__cause__


def _ended(name: str, kind: str, followed: Followed) -> ClusterError:
    if kind == "run":
        return ClusterError(f"run {name!r} is ended by its driver; go on with run --resume {followed.info.directory}")
    return ClusterError(f"service {name!r} is being taken down; {_goes_on(name, followed.info.id)}")


def _silent(name: str, kind: str, measurement: str) -> ClusterError:
    text = f"{kind} {name!r}: no answer for {SILENT_S:g} s, its controller hangs or its machine is overloaded"
    if kind == "service":
        text += f"; ask again with `results {measurement}`, or restart it: `down --run {name}`, then `up CONFIG`"
    return ClusterError(text)


def _goes_on(name: str, measurement: str) -> str:
    return f"{measurement} keeps its whole rounds and goes on after `up CONFIG --name {name}`"
