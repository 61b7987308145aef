"""A signal that comes where Python drops its exception is not lost."""

import contextlib
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from ray_probe.interrupts import interrupted, signals_interrupt
from ray_probe.service.client import ProbeClient


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_raise_are_kept_and_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with signals_interrupt():
        assert not interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert interrupted()
    assert signal.getsignal(number) is before


def test_who_follows_a_measurement_stops_though_the_exception_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ProbeClient(None, "demo", "ray_probe", contextlib.ExitStack())
    asked = 0

    def answer(method: str, *args: object, **options: object) -> Any:
        nonlocal asked
        asked += 1
        with contextlib.suppress(KeyboardInterrupt):  # as in a callback from foreign code
            os.kill(os.getpid(), signal.SIGINT)
        return SimpleNamespace(cursor=0, events=(), info=SimpleNamespace(finished=None))

    monkeypatch.setattr(client, "_ask", answer)
    with signals_interrupt(), pytest.raises(KeyboardInterrupt):
        client.wait("m0001", stop=interrupted)
    assert asked == 1
