"""`up` waits for the first rollout actor, and reports what that waits for."""

from dataclasses import replace
from typing import Any

import pytest
from support.replies import a_status

from ray_probe.controller.replies import Status
from ray_probe.errors import ClusterError, ProbeError
from ray_probe.service import lifecycle

WAITING = "actors: 2 of 2 wait for room: each asks for 1 CPU, free are 0 CPU; they start when other work leaves it"


class Starting:
    """A client of a starting service: answers these states, then this error."""

    def __init__(self, *statuses: Status, error: ProbeError | None = None) -> None:
        self._left = list(statuses)
        self._error = error

    def status(self, deadline_s: float = 0.0) -> Status:
        return self._left.pop(0)

    def start_error(self) -> ProbeError | None:
        return None if self._left else self._error


def a_start(alive: int = 0, *warnings: str) -> Status:
    return replace(a_status(), actors_alive=alive, warnings=warnings)


def waited_for(monkeypatch: pytest.MonkeyPatch, client: Any) -> tuple[int, list[str]]:
    monkeypatch.setattr(lifecycle, "POLL_S", 0.0)
    said: list[str] = []
    return lifecycle.wait_until_ready(client, said.append), said


def test_up_reports_once_that_actors_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    known = "few shards, as `up` has said already"
    states = [a_start(0, known), a_start(0, known, WAITING), a_start(0, known, WAITING), a_start(1, known)]
    queued, said = waited_for(monkeypatch, Starting(*states))
    assert said == [WAITING]
    assert queued == 3, "two wait, and one is at work"


def test_up_ends_with_what_keeps_the_first_actor_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Starting(a_start(), a_start(), error=ClusterError("cluster.actors: got 2; none was placed in 30 s"))
    with pytest.raises(ClusterError, match="none was placed in 30 s"):
        waited_for(monkeypatch, client)
