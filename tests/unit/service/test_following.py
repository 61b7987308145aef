"""A client that follows a measurement learns why the measurement stops."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from ray_probe.controller.replies import Followed
from ray_probe.errors import ClusterError, NoClusterError
from ray_probe.service import following
from ray_probe.service.following import SILENT_S, follow


class Time:
    """Passes as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(following, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.pass_by))

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def followed(finished: str | None = None, closing: bool = False, cursor: int = 1) -> Followed:
    info: Any = SimpleNamespace(finished=finished, id="m0001", directory="/runs/demo/m0001")
    return Followed(cursor, (), info, closing)


def failing(cause: Exception) -> ClusterError:
    error = ClusterError("demo: does not answer")
    error.__cause__ = cause
    return error


def asked(*answers: Followed | Exception) -> Callable[..., Followed]:
    """Gives these answers one after the other."""
    left = list(answers)

    def ask(method: str, *args: Any, **options: Any) -> Followed:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


def test_a_measurement_is_followed_over_a_death_of_the_controller_to_its_end(passing: Time) -> None:
    busy = failing(ActorUnavailableError("it is restarted", None))
    follow(asked(followed(), busy, busy, followed(cursor=4), followed("now")), "demo", "service", "m0001", print)


SERVICE = r"^service 'demo' {}; m0001 keeps its whole rounds and goes on after `up CONFIG --name demo`$"


@pytest.mark.parametrize(
    ("kind", "answer", "said"),
    [
        ("service", followed(closing=True), SERVICE.format("is being taken down")),
        ("service", failing(ActorDiedError()), SERVICE.format("was taken down")),
        ("run", followed(closing=True), r"^run 'demo' is ended by its driver; go on with run --resume /runs/demo/m"),
        ("run", failing(ActorDiedError()), r"^demo: does not answer$"),
        ("service", NoClusterError("cluster: its head at h:1 is gone"), r"^cluster: its head at h:1 is gone$"),
    ],
)
def test_a_follower_learns_that_it_ends_before_the_measurement_does(
    passing: Time, kind: str, answer: Followed | Exception, said: str
) -> None:
    with pytest.raises(ClusterError, match=said) as ended:
        follow(asked(followed(), answer), "demo", kind, "m0001", print)
    assert ended.value.exit_code == 4


def test_a_measurement_that_has_ended_is_not_told_as_cut_off(passing: Time) -> None:
    follow(asked(followed("now", closing=True)), "demo", "service", "m0001", print)


@pytest.mark.parametrize(
    ("kind", "remedy"), [("service", "`results m0001`, or restart it: `down --run demo`"), ("run", "")]
)
def test_a_controller_that_hangs_is_told_after_its_time_and_no_sooner(passing: Time, kind: str, remedy: str) -> None:
    waited = []

    def hang(method: str, *args: Any, deadline_s: float, **options: Any) -> Any:
        if not waited:
            waited.append(0.0)
            return followed()
        waited.append(deadline_s)
        passing.pass_by(deadline_s)
        raise failing(GetTimeoutError())

    began = passing.now
    with pytest.raises(ClusterError, match=f"^{kind} 'demo': no answer for 45 s, its controller hangs") as ended:
        follow(hang, "demo", kind, "m0001", print)
    assert remedy in str(ended.value)
    assert isinstance(ended.value.__cause__, GetTimeoutError), "what the run's driver tells it by"
    assert passing.now - began == pytest.approx(SILENT_S, abs=1.0) and len(waited) == 2
