"""Waiting ends with the first true answer, or with the deadline."""

from types import SimpleNamespace

import pytest

from ray_probe.system import clock
from ray_probe.system.clock import wait_until


class FakeTime(SimpleNamespace):
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        super().__init__(now=100.0, slept=[])

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(clock, "time", fake)
    return fake


def test_the_first_true_answer_is_returned(fake_time: FakeTime) -> None:
    answers = iter(["", "", "there", "later"])
    assert wait_until(lambda: next(answers), 10.0, every_s=0.5) == "there"
    assert fake_time.slept == [0.5, 0.5]


def test_the_check_is_made_once_more_at_the_deadline(fake_time: FakeTime) -> None:
    seen = []
    assert wait_until(lambda: seen.append(fake_time.now), 1.2, every_s=0.5) is None
    assert seen == pytest.approx([100.0, 100.5, 101.0, 101.2])


def test_without_time_the_check_is_made_once(fake_time: FakeTime) -> None:
    answers = iter([False, True])
    assert wait_until(lambda: next(answers), 0.0) is False
    assert fake_time.slept == []
