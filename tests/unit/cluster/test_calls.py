"""A call waits with looks in between, retries over a restart, and raises what the actor raised."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from ray_probe.cluster.actors import calls
from ray_probe.cluster.actors.calls import call, call_long, call_restarted, is_gone
from ray_probe.cluster.actors.writer import NotOpen, WriterHandle
from ray_probe.errors import ClusterError, LedgerError


class Slow:
    """Stands in for Ray: an answer comes after `looks` waits, or never."""

    def __init__(self, looks: int | None) -> None:
        self.looks = looks

    def wait(self, references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        assert 0 < timeout <= 0.5
        if self.looks is not None:
            self.looks -= 1
        return ([], references) if self.looks is None or self.looks >= 0 else (references, [])

    def get(self, reference: str, timeout: float) -> str:
        if self.looks is None or self.looks >= 0:
            raise ray.exceptions.GetTimeoutError
        return reference


def asked(monkeypatch: pytest.MonkeyPatch, slow: Slow, deadline_s: float, **options: Any) -> Any:
    monkeypatch.setattr(ray, "wait", slow.wait)
    monkeypatch.setattr(ray, "get", slow.get)
    method = SimpleNamespace(remote=lambda: "answer")
    return call("demo", method, deadline_s=deadline_s, **options)


def test_the_answer_is_waited_for_with_looks_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    assert asked(monkeypatch, Slow(3), 60.0, meanwhile=lambda: looks.append(1)) == "answer"
    assert len(looks) == 3


def test_what_a_look_raises_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise ClusterError("cluster: its head is gone")

    with pytest.raises(ClusterError, match="head is gone"):
        asked(monkeypatch, Slow(None), 60.0, meanwhile=lost)


def test_without_an_answer_in_time_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"demo: no answer in 0\.01 s"):
        asked(monkeypatch, Slow(None), 0.01)


def answering(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> list[float]:
    """Have `ray.get` give or raise these answers in turn; returns the seconds that were waited in between."""
    left, paused = list(answers), list[float]()

    def get(reference: Any, timeout: float) -> Any:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    clock = SimpleNamespace(monotonic=lambda: sum(paused), sleep=paused.append)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(calls, "time", clock)
    return paused


METHOD: Any = SimpleNamespace(remote=lambda *arguments: "reference")
RESTARTING = ActorUnavailableError("it is restarted", None)


def test_a_call_is_retried_while_ray_restarts_the_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    paused = answering(monkeypatch, RESTARTING, RESTARTING, 7)
    assert call_restarted("fitter", METHOD, deadline_s=60.0) == 7
    assert len(paused) == 2


def test_a_restart_that_takes_too_long_ends_the_call_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    paused = answering(monkeypatch, *[RESTARTING] * 100)
    with pytest.raises(ClusterError, match=r"^fitter: no answer in 2 s; go on with run --resume$"):
        call_restarted("fitter", METHOD, deadline_s=2.0)
    assert sum(paused) == pytest.approx(2.0, abs=0.2)


def test_an_actor_that_is_gone_ends_the_call_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    paused = answering(monkeypatch, ActorDiedError())
    with pytest.raises(ClusterError, match=r"^fitter: does not answer .*; go on with run --resume$") as ended:
        call_restarted("fitter", METHOD, deadline_s=60.0)
    assert paused == [] and isinstance(ended.value.__cause__, ClusterError) and is_gone(ended.value.__cause__)


def test_what_the_method_raised_comes_back_in_its_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RayTaskError("accept", "traceback", LedgerError("ledger.jsonl: is damaged"))
    answering(monkeypatch, error)
    with pytest.raises(LedgerError, match="is damaged"):
        call_restarted("fitter", METHOD, deadline_s=60.0)


def test_a_long_call_goes_on_as_long_as_the_actor_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = iter([False, False, True])
    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []) if next(ready) else ([], references))
    answering(monkeypatch, "alive", "alive", "m0001")
    assert call_long("demo", METHOD, alive=METHOD, silent_s=20.0) == "m0001"


def test_a_writer_that_was_restarted_is_given_its_gradient_and_asked_once_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: list[tuple[Any, ...]] = []

    def method(name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: sent.append((name, *arguments)))

    actor: Any = SimpleNamespace(open=method("open"), go_on=method("go_on"), commit=method("commit"))
    lost = RayTaskError("commit", "traceback", NotOpen("writer: no gradient is open"))
    answering(monkeypatch, 2.5, lost, None, (4.5, -1.5, "ab"))
    log: list[str] = []
    writer = WriterHandle(actor, log.append)
    writer.open(tmp_path, "layout", 3, {2: "zz", 3: "aa"}, 2)
    assert (writer.norm_sq, writer.rounds, writer.sha256) == (2.5, 3, "aa")
    writer.commit("staging", 4)
    reopened = (str(tmp_path), "layout", 3, {2: "zz", 3: "aa"}, 2)
    assert sent == [("open", *reopened), ("commit", "staging", 4), ("go_on", *reopened), ("commit", "staging", 4)]
    assert (writer.norm_sq, writer.cross, writer.rounds, writer.sha256) == (4.5, -1.5, 4, "ab")
    assert log == ["writer: its process died; it goes on from the gradient through 3 rounds"]
