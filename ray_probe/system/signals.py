"""Interrupts by signals: none is lost, and the process ends in time.

Python raises KeyboardInterrupt wherever the main thread is. Inside a callback of Ray it is printed and dropped, so the
signal is also recorded, and waiting loops check it. While the main thread waits in C++ no handler runs, so a thread
that the signal wakes ends the process.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_INTERRUPTED = 130
TWICE_S = 1.0
"""Signals within this time count as one: `timeout` and batch systems signal process and group."""
GRACE_S = 3.6
LAST_S = 0.9

_asked = threading.Event()
_asked_at = 0.0
_last: list[Callable[[], object]] = []
_watched = False


def interrupted() -> bool:
    """Returns whether a signal arrived in the current block."""
    return _asked.is_set()


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, SIGTERM or a lost terminal in the block.

    A second signal raises again unless it follows within `TWICE_S`, or the block is one of `ends_in_time`. An ignored
    SIGHUP, as under nohup, stays ignored.
    """
    _asked.clear()
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    with _handled(_interrupt, [number for number in SIGNALS if number != signal.SIGHUP or not ignored]):
        yield


@contextlib.contextmanager
def ends_in_time() -> Iterator[None]:
    """End this process `GRACE_S` after the first signal, or at a second one.

    The grace period includes the time after the block. The steps of `at_last` run first, for `LAST_S` at most.
    """
    global _watched
    wakes, wake = os.pipe()
    for descriptor in (wakes, wake):
        os.set_blocking(descriptor, descriptor == wakes)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(wakes,), name="interrupts", daemon=True).start()
    _watched = True
    try:
        with signals_interrupt():
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(wake)
        _watched = False


def end_now() -> None:
    """In a block of `ends_in_time`, run the steps of `at_last` and end the process."""
    if _watched:
        _steps()
        os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def at_last(step: Callable[[], object]) -> Iterator[None]:
    """Run a step in another thread if the process is ended in the block; newest first."""
    _last.append(step)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the step has run
            _last.remove(step)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Raise on a signal only after the block, which must be short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    with _handled(lambda number, frame: came.append(number), before):
        yield
    if came:
        before[signal.Signals(came[0])](came[0], None)


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], object], numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Handle these signals in the block; restores the handlers before."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _asked_at
    again, now = _asked.is_set(), time.monotonic()
    if not again:
        _asked_at = now
        _asked.set()
    if not again or (now - _asked_at > TWICE_S and not _watched):
        raise KeyboardInterrupt


def _watch(wakes: int) -> None:
    """Reads signal numbers; the first starts the grace period, a later one ends it."""
    deadline: float | None = None
    while deadline is None or time.monotonic() < deadline:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if wakes < 0:
            time.sleep(left or 0.0)
            continue
        if not select.select([wakes], [], [], left)[0]:
            continue
        numbers, now = os.read(wakes, 64), time.monotonic()
        if not numbers:  # the block is over
            os.close(wakes)
            wakes = -1
            if deadline is None:
                return
        elif any(number in SIGNALS for number in numbers):
            if deadline is None:
                deadline = now + GRACE_S
            elif now > deadline - GRACE_S + TWICE_S:
                deadline = now
    _end()


def _end() -> None:
    """Runs the steps and ends this process."""
    thread = threading.Thread(target=_steps, daemon=True)
    thread.start()
    thread.join(LAST_S)
    os._exit(EXIT_INTERRUPTED)


def _steps() -> None:
    """Runs each step once, over all threads."""
    with contextlib.suppress(IndexError):
        while True:
            step = _last.pop()
            with contextlib.suppress(Exception):
                step()
