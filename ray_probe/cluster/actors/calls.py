"""Calls of Ray actors with a deadline, and what their errors mean."""

import re
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from ray_probe.errors import ClusterError

LOOK_EVERY_S = 0.5
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # Ray colours the names in its messages


def task_error(error: Exception) -> Exception:
    """The exception that a remote method raised, in its own type where that is one of ours."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, Exception) else error


def first_line(error: BaseException) -> str:
    """One line for people: the type and the first line of the text."""
    text = _COLOURS.sub("", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def ask(
    actor: Any, who: str, method: str, *args: Any, deadline_s: float, meanwhile: Callable[[], None] | None = None
) -> Any:
    """Call a method of an actor and wait for its answer.

    Args:
        actor: its handle.
        who: what it is called in messages.
        method: name of the method.
        args: its arguments.
        deadline_s: seconds to wait.
        meanwhile: called twice a second while the answer is awaited; what it raises ends the wait.

    Raises:
        ProbeError: what the method raised.
        ClusterError: no answer in time, or the actor is gone; its cause is Ray's error.
    """
    return _answer(getattr(actor, method).remote(*args), who, method, deadline_s, meanwhile)


def ask_for_long(actor: Any, who: str, method: str, *args: Any, silent_s: float) -> Any:
    """Call a method that may take long, and wait as long as the actor answers `pid` meanwhile.

    Args:
        actor: its handle; it answers several calls at once.
        who: what it is called in messages.
        method: name of the method.
        args: its arguments.
        silent_s: seconds between two questions, and to wait for each answer.

    Raises:
        ProbeError: what the method raised.
        ClusterError: the actor does not answer any more.
    """
    answer = getattr(actor, method).remote(*args)
    while not ray.wait([answer], timeout=silent_s)[0]:
        ask(actor, who, "pid", deadline_s=silent_s)
    return _answer(answer, who, method, silent_s)


def _answer(
    reference: Any, who: str, method: str, deadline_s: float, meanwhile: Callable[[], None] | None = None
) -> Any:
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
        raise ClusterError(f"{who}: no answer to {method!r} in {deadline_s:g} s") from error
    except RayError as error:
        raise ClusterError(f"{who}: does not answer ({first_line(error)})") from error


def is_silent(error: ClusterError) -> bool:
    """Whether the actor did not answer in time; it may still live."""
    return isinstance(error.__cause__, GetTimeoutError)


def is_gone(error: ClusterError) -> bool:
    """Whether the actor is dead and Ray does not restart it."""
    return isinstance(error.__cause__, ActorDiedError)


def kill(actor: Any) -> None:
    """End an actor for good, one that is made again when it dies too."""
    ray.kill(actor, no_restart=True)


PAUSE_S = 0.1


REMEDY = "go on with run --resume"


def ask_again(actor: Any, who: str, method: str, *args: Any, deadline_s: float) -> Any:
    """Call a method that may be called twice, again and again while Ray makes the actor anew.

    Args:
        actor: its handle.
        who: what it is called in messages.
        method: name of the method.
        args: its arguments.
        deadline_s: seconds to wait in all.

    Raises:
        ProbeError: what the method raised.
        ClusterError: no answer in time, or the actor is gone for good.
    """
    give_up = time.monotonic() + deadline_s
    while True:
        try:
            return ask(actor, who, method, *args, deadline_s=max(give_up - time.monotonic(), PAUSE_S))
        except ClusterError as error:
            if time.monotonic() + PAUSE_S > give_up:
                raise ClusterError(f"{who}: no answer to {method!r} in {deadline_s:g} s; {REMEDY}") from error
            if not isinstance(error.__cause__, ActorUnavailableError):
                raise ClusterError(f"{error}; {REMEDY}") from error
        time.sleep(PAUSE_S)


class NotOpen(Exception):
    """The writer's process was made again, and has not been told yet what it is at work on."""
