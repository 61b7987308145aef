"""Standard streams that may be closed, full, or unable to write our signs: nothing of that is a traceback."""

import contextlib
import io
import os
import sys
from typing import TextIO

from ray_probe.errors import OutputError
from ray_probe.report.signs import ENCODING_ERRORS

_STREAMS = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"))


def prepare() -> None:
    """Give each stream that was closed a descriptor, and write plain signs where an encoding lacks ours.

    Python has no stream in the place of a descriptor that is closed, and the next file that is opened would take its
    number. Writing to the new stdout fails, as it does on a closed one; what goes to the new stderr is dropped.
    """
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
        stream: stdout, or what has its place.
        kept: what is not lost with the text, for the error.
        code: what the command was about to exit with.

    Raises:
        OutputError: the stream does not take it; its exit code is `code`, or 1 in the place of 0.
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
    """Write a line to stderr; a stderr that takes nothing ends no run."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _discard(sys.stderr)


def takes_output(stream: TextIO) -> bool:
    """Whether a stream takes what was written to it; what it does not take is dropped."""
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
    """Send what a stream still holds to nowhere: Python flushes it when it ends, and would exit with 120."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
