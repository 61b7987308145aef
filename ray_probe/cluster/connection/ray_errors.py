"""What Ray's errors say, in one line for people."""

import re

from ray.exceptions import RayTaskError

MAX_LINE = 300
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # Ray colours the names in its messages


def task_error(error: Exception) -> Exception:
    """Return the exception of a remote function, in its own type where Ray kept it."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, Exception) else error


def plain_text(error: BaseException) -> str:
    """Return the text of an error without terminal colours."""
    return _COLOURS.sub("", str(error)).strip()


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    text = plain_text(error)
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:MAX_LINE]
