"""A wait for an actor's answer calls a check meanwhile, and ends with what that raises."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from ray_probe.cluster.actors.calls import call
from ray_probe.errors import ClusterError


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
