"""Calls of Ray actors: deadlines, and retries while Ray restarts an actor."""

import time
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from ray_probe.cluster.connection.ray_errors import first_line, task_error
from ray_probe.errors import ClusterError

LOOK_EVERY_S = 0.5
PAUSE_S = 0.1
REMEDY = "go on with run --resume"

MethodT = TypeVar("MethodT", bound=Callable[..., Any])
ResultT = TypeVar("ResultT")
ArgTs = TypeVarTuple("ArgTs")


def in_group(name: str) -> Callable[[MethodT], MethodT]:
    """Have the threads of a concurrency group serve this method of an actor."""
    decorator: Callable[[MethodT], MethodT] = ray.method(concurrency_group=name)
    return decorator


def send(method: Callable[[*ArgTs], Any], *args: *ArgTs) -> Any:
    """Start a call of a bound remote method; returns Ray's reference to the answer."""
    remote: Any = method
    return remote.remote(*args)


def call(
    name: str,
    method: Callable[[*ArgTs], ResultT],
    *args: *ArgTs,
    deadline_s: float,
    meanwhile: Callable[[], None] | None = None,
) -> ResultT:
    """Call a method of an actor and return its answer.

    Args:
        name: the actor, for messages.
        method: bound remote method, such as `actor.beta`.
        args: its arguments.
        deadline_s: seconds to wait.
        meanwhile: called twice a second during the wait; its error ends the wait.

    Raises:
        ProbeError: the method raised it.
        ClusterError: no answer in time, or the actor is gone; Ray's error is the cause.
    """
    answer: ResultT = _answer(send(method, *args), name, deadline_s, meanwhile)
    return answer


def call_long(
    name: str, method: Callable[[*ArgTs], ResultT], *args: *ArgTs, alive: Callable[[], Any], silent_s: float
) -> ResultT:
    """Call a method that takes long, for as long as the actor lives.

    Args:
        name: the actor, for messages.
        method: bound remote method.
        args: its arguments.
        alive: bound remote method that the actor answers meanwhile, on another thread.
        silent_s: seconds between two calls of `alive`, and their deadline.

    Raises:
        ProbeError: the method raised it.
        ClusterError: the actor does not answer any more.
    """
    reference = send(method, *args)
    while not ray.wait([reference], timeout=silent_s)[0]:
        call(name, alive, deadline_s=silent_s)
    answer: ResultT = _answer(reference, name, silent_s)
    return answer


def call_restarted(name: str, method: Callable[[*ArgTs], ResultT], *args: *ArgTs, deadline_s: float) -> ResultT:
    """Call an idempotent method, and retry while Ray restarts the actor.

    Args:
        name: the actor, for messages.
        method: bound remote method.
        args: its arguments.
        deadline_s: seconds to wait in all.

    Raises:
        ProbeError: the method raised it.
        ClusterError: no answer in time, or Ray does not restart the actor.
    """
    give_up = time.monotonic() + deadline_s
    while True:
        try:
            return call(name, method, *args, deadline_s=max(give_up - time.monotonic(), PAUSE_S))
        except ClusterError as error:
            if time.monotonic() + PAUSE_S > give_up:
                raise ClusterError(f"{name}: no answer in {deadline_s:g} s; {REMEDY}") from error
            if not isinstance(error.__cause__, ActorUnavailableError):
                raise ClusterError(f"{error}; {REMEDY}") from error
        time.sleep(PAUSE_S)


def _answer(reference: Any, name: str, deadline_s: float, meanwhile: Callable[[], None] | None = None) -> Any:
    ends = time.monotonic() + deadline_s
    try:
        while meanwhile is not None and time.monotonic() + LOOK_EVERY_S < ends:
            if ray.wait([reference], timeout=LOOK_EVERY_S)[0]:
                break
            meanwhile()
        return ray.get(reference, timeout=max(0.0, ends - time.monotonic()))
    except RayTaskError as error:
        raise task_error(error) from None
    except GetTimeoutError as error:
        raise ClusterError(f"{name}: no answer in {deadline_s:g} s") from error
    except RayError as error:
        raise ClusterError(f"{name}: does not answer ({first_line(error)})") from error


def is_silent(error: ClusterError) -> bool:
    """Whether the actor did not answer in time; it may still live."""
    return isinstance(error.__cause__, GetTimeoutError)


def is_gone(error: ClusterError) -> bool:
    """Whether the actor is dead and Ray does not restart it."""
    return isinstance(error.__cause__, ActorDiedError)


def kill(actor: Any) -> None:
    """End an actor for good, also one that Ray would restart."""
    ray.kill(actor, no_restart=True)
