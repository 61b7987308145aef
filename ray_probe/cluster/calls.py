"""Calls of Ray actors with a deadline, and what their errors mean."""

import re
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

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
    actor: Any,
    who: str,
    method: str,
    *args: Any,
    deadline_s: float,
    meanwhile: Callable[[], None] = lambda: None,
) -> Any:
    """Call a method of an actor and wait for its answer.

    Args:
        actor: its handle.
        who: what it is called in messages.
        method: name of the method.
        args: its arguments.
        deadline_s: seconds to wait.
        meanwhile: called twice a second; what it raises ends the wait.

    Raises:
        ProbeError: what the method raised.
        ClusterError: no answer in time, or the actor is gone.
    """
    try:
        answer = getattr(actor, method).remote(*args)
        give_up = time.monotonic() + deadline_s
        while (left := give_up - time.monotonic()) > 0 and not ray.wait([answer], timeout=min(left, LOOK_EVERY_S))[0]:
            meanwhile()
        return ray.get(answer, timeout=max(0.0, left))
    except RayTaskError as error:
        raise task_error(error) from None
    except GetTimeoutError:
        raise ClusterError(f"{who}: no answer to {method!r} in {deadline_s:g} s") from None
    except RayError as error:
        raise ClusterError(f"{who}: does not answer ({first_line(error)})") from error


def kill(actor: Any) -> None:
    """End an actor for good, one that is made again when it dies too."""
    ray.kill(actor, no_restart=True)
