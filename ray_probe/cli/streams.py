"""Standard streams that may be closed, full, or unable to write our signs."""

import contextlib
import io
import os
import sys
from typing import TextIO

from ray_probe.errors import OutputError
from ray_probe.report.signs import ENCODING_ERRORS

_STREAMS = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"))


def prepare() -> None:
    """Open closed streams again, and write plain signs where an encoding lacks ours.

    Writing to a stdout that was closed still fails; text for a stderr that was closed is dropped.
    """
    # Python has no stream for a closed descriptor, and the next opened file would take its number.
    for name, flags, mode in _STREAMS:
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, flags)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ENCODING_ERRORS)


def write(text: str, stream: TextIO, kept: str | None = None, code: int = 0) -> None:
    """Write a text to a stream for results, at once.

    Args:
        text: what is written.
        stream: stdout or its replacement.
        kept: what the command achieved, for the error.
        code: exit code of the command.

    Raises:
        OutputError: the stream cannot be written; its exit code is `code`, or 1 instead of 0.
    """
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: the stream is closed
        _discard(stream)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        refused = OutputError(f"stdout: cannot be written ({reason})" + ("" if kept is None else f"; {kept}"))
        refused.exit_code = code or OutputError.exit_code
        raise refused from None


def tell(text: str) -> None:
    """Write a line to stderr; errors of stderr are ignored."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _discard(sys.stderr)


def takes_output(stream: TextIO) -> bool:
    """Return whether a stream can be written; drops its text where it cannot."""
    try:
        stream.flush()
        os.write(stream.fileno(), b"")  # an unbuffered stream has nothing to flush
    except io.UnsupportedOperation:  # it is in memory
        return True
    except (OSError, ValueError):
        _discard(stream)
        return False
    return True


def _discard(stream: TextIO) -> None:
    """Drop what a stream still holds."""
    # Python flushes it at the end, and would exit with 120.
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
