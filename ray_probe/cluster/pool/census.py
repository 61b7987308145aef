"""The actors of a pool at one moment, as people see them."""

from collections.abc import Mapping
from dataclasses import dataclass

from ray_probe.cluster.pool.worker import Worker
from ray_probe.controller.replies import Actor


@dataclass(frozen=True)
class Census:
    """A consistent snapshot of a pool.

    Attributes:
        asked: actors asked for.
        alive: actors that have loaded the current checkpoint.
        starting: actors that start or load it, without those that no node had room for.
        members: every actor, by number.
        waiting: one line on the actors that no node has room for; None where all have room.
        last_failure: the last death, in one line, or None.
    """

    asked: int
    alive: int
    starting: int
    members: tuple[Actor, ...]
    waiting: str | None
    last_failure: str | None


def census(asked: int, workers: Mapping[int, Worker], version: int, last_failure: str | None) -> Census:
    """Take the census of a pool whose current checkpoint has this version."""
    loading = [one for one in workers.values() if one.reference is not None and one.loaded != version]
    return Census(
        asked=asked,
        alive=sum(worker.loaded == version for worker in workers.values()),
        starting=sum(worker.placed or worker.had_room for worker in loading),
        members=tuple(_member(number, worker, version) for number, worker in sorted(workers.items())),
        waiting=waiting(asked, workers),
        last_failure=last_failure,
    )


def waiting(asked: int, workers: Mapping[int, Worker]) -> str | None:
    """Return one line on the actors that wait for room; None where all have room."""
    seen = [worker.no_room for worker in workers.values() if worker.waits_for_room]
    if not seen or seen[0] is None:
        return None
    room = f"each asks for {seen[0].asked}, free are {seen[0].free}"
    return f"actors: {len(seen)} of {asked} wait for room: {room}; they start when other work leaves it"


def _member(number: int, worker: Worker, version: int) -> Actor:
    if worker.loaded != version:
        state = "no checkpoint" if worker.reference is None else "starting" if worker.loaded < 0 else "loading"
    else:
        state = "idle" if worker.task is None else str(worker.task)
    state += ", not reachable" if worker.unreachable is not None else ""
    state += ", leaving" if worker.leaving else ""
    node, pid = (None, None) if worker.facts is None else (worker.facts.node, worker.facts.pid)
    return Actor(number, state, node, pid, worker.heard)
