"""A signal that comes where Python drops its exception is not lost."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ray_probe.service.client import ProbeClient
from ray_probe.system import signals
from ray_probe.system.clock import wait_until
from ray_probe.system.signals import deferred, interrupted, signals_interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_raise_are_kept_and_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with signals_interrupt():
        assert not interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert interrupted()
    assert signal.getsignal(number) is before


def test_who_follows_a_measurement_stops_though_the_exception_was_dropped() -> None:
    controller = SimpleNamespace(name="demo", actor=None)
    client = ProbeClient(controller, "ray_probe", contextlib.ExitStack())
    asked = 0

    def answer(*args: object, **options: object) -> Any:
        nonlocal asked
        asked += 1
        with contextlib.suppress(KeyboardInterrupt):  # as in a callback from foreign code
            os.kill(os.getpid(), signal.SIGINT)
        return SimpleNamespace(cursor=0, events=(), info=SimpleNamespace(finished=None))

    client.follow = answer
    with signals_interrupt(), pytest.raises(KeyboardInterrupt):
        client.wait("m0001", stop=interrupted)
    assert asked == 1


def test_a_second_signal_raises_again_unless_it_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with signals_interrupt():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # `timeout` signals its child, and the child's group after that
        monkeypatch.setattr(signals, "TWICE_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_lost_terminal_interrupts_but_not_under_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with signals_interrupt(), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with signals_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_during_clean_up_raises_after_it() -> None:
    cleaned = False
    with signals_interrupt(), pytest.raises(KeyboardInterrupt), deferred():
        os.kill(os.getpid(), signal.SIGINT)
        cleaned = True
    assert cleaned


STUCK = """
import ctypes, sys, threading, time
from ray_probe.system.signals import at_last, ends_in_time
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
with ends_in_time(), at_last(lambda: print("oldest", flush=True)), at_last(lambda: time.sleep(float(sys.argv[1]))):
    with at_last(lambda: 1 / 0), at_last(lambda: print("newest", flush=True)):
        threading.Timer(0.3, lambda: print("waits", flush=True)).start()
        libc.pthread_mutex_lock(mutex)  # for ever, and no handler of Python runs meanwhile
"""


@contextlib.contextmanager
def stuck(step_s: float) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen([sys.executable, "-c", STUCK, str(step_s)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "waits\n"
        yield process


@pytest.mark.parametrize(("step_s", "said"), [(0.0, "newest\noldest\n"), (60.0, "newest\n")])
def test_a_process_that_waits_in_c_ends_in_time_with_its_last_steps(step_s: float, said: str) -> None:
    with stuck(step_s) as process:
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == signals.EXIT_INTERRUPTED and out == said
        assert time.monotonic() - start < 5.0


def test_a_second_signal_ends_it_at_once() -> None:
    with stuck(0.0) as process:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(signals.TWICE_S + 0.2)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == signals.EXIT_INTERRUPTED
        assert time.monotonic() - start < signals.GRACE_S - signals.TWICE_S


ENDS = """
import time
from ray_probe.system.signals import ends_in_time
try:
    with ends_in_time():
        print("waits", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
time.sleep(60)
"""


def test_the_time_goes_on_after_the_block_and_does_not_begin_without_a_signal() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
        assert (process.returncode, out) == (signals.EXIT_INTERRUPTED, "interrupted\n")
    before = threading.active_count()
    with signals.ends_in_time():
        assert threading.active_count() == before + 1
    assert wait_until(lambda: threading.active_count() == before, 10), "nothing is left to end this process"


NOW = """
from ray_probe.system.signals import at_last, end_now, ends_in_time
with at_last(lambda: print("not in a block", flush=True)):
    end_now()
with ends_in_time(), at_last(lambda: print("step", flush=True)):
    end_now()
print("never")
"""


def test_a_block_can_be_ended_now_with_its_last_steps_and_other_code_cannot() -> None:
    done = subprocess.run([sys.executable, "-c", NOW], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (signals.EXIT_INTERRUPTED, "step\n"), done.stderr
