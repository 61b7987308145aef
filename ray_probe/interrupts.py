"""Ctrl-C and SIGTERM that are not lost.

Python raises KeyboardInterrupt wherever the main thread is; inside a callback from Ray's own code it is printed and
dropped. So that a signal has come is kept too, and who waits in a loop asks for it.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_asked = threading.Event()


def interrupted() -> bool:
    """Whether one of the signals has come in the block at hand."""
    return _asked.is_set()


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Have Ctrl-C, and SIGTERM as schedulers send it, raise KeyboardInterrupt in the block, and be kept."""
    _asked.clear()
    before = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt
