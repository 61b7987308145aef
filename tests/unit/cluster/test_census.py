"""The census of a pool: each actor's state in words, and counts that fit each other while threads scale it."""

import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ray_probe.cluster.pool.census import census
from ray_probe.cluster.pool.failure_policy import NoRoom
from ray_probe.cluster.pool.pool import Pool
from ray_probe.cluster.pool.worker import Worker
from ray_probe.controller.replies import Actor
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.run.messages import ActorFacts

VERSION, ACTORS = 3, 40


def a_worker(**fields: Any) -> Worker:
    return Worker(SimpleNamespace(kill=lambda: None), had_room=True, since=0.0, **fields)


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({}, "no checkpoint"),
        ({"reference": "start"}, "starting"),
        ({"reference": "start", "loaded": 2}, "loading"),
        ({"loaded": VERSION}, "idle"),
        ({"loaded": VERSION, "task": "collect 1/3"}, "collect 1/3"),
        ({"loaded": VERSION, "task": "collect 1/3", "leaving": True}, "collect 1/3, leaving"),
        ({"loaded": VERSION, "unreachable": (1.0, "reset")}, "idle, not reachable"),
    ],
)
def test_an_actor_is_shown_with_what_it_does(fields: dict[str, Any], state: str) -> None:
    facts = ActorFacts(ParameterLayout((), ()), "cpu", 1, 0, node="10.0.0.7", pid=41234)
    (member,) = census(1, {5: a_worker(facts=facts, heard=17, **fields)}, VERSION, None).members
    assert member == Actor(5, state, "10.0.0.7", 41234, 17)


def test_actors_that_no_node_has_room_for_do_not_count_as_starting() -> None:
    loading = a_worker(reference="start", doing="starting")
    waits = a_worker(reference="start", doing="starting", no_room=NoRoom(9.0, 3, "1 GPU", "0 GPU"))
    waits.had_room = False
    there = census(3, {2: waits, 0: a_worker(loaded=VERSION), 1: loading}, VERSION, "actor 9: it died")
    assert (there.asked, there.alive, there.starting, there.last_failure) == (3, 1, 1, "actor 9: it died")
    assert [member.number for member in there.members] == [0, 1, 2]
    assert there.waiting is not None and there.waiting.startswith("actors: 1 of 3 wait for room: each asks for 1 GPU")


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_pool_can_be_counted_and_scaled_while_another_thread_replaces_actors(switching: None) -> None:
    pool, over, errors = Pool(2, {}, lambda text: None), threading.Event(), list[BaseException]()

    def count() -> None:
        try:
            while not over.is_set():
                there = pool.census()
                assert len(there.members) <= ACTORS
                pool.scale(5 if there.asked == 2 else 2)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=count)
    thread.start()
    for number in range(40 * ACTORS):
        if number >= ACTORS:
            pool.remove(number - ACTORS, "it died")
        with pool._lock:
            pool._workers[number] = a_worker()
    over.set()
    thread.join()
    assert errors == []
