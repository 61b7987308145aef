"""A rollout actor as the pool sees it: what it has loaded, what it was given to do, when it was last heard of."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something that an actor's task came to.

    Attributes:
        actor: number of the actor.
        task: what it had been asked, as given to `submit`; None for its start.
        value: the task's result, or None.
        error: why the task failed (the actor lives), or None.
        died: why the actor is gone, or None.
    """

    actor: int
    task: Any
    value: Any = None
    error: str | None = None
    died: str | None = None


@dataclass
class Worker:
    """One actor. Versions count the checkpoints that the pool was told to load; -1 is none."""

    handle: Any
    born: float
    had_room: bool
    loaded: int = -1
    version: int = -1
    task: Any = None
    reference: Any = None
    since: float = 0.0
    heartbeat: Any = None
    tokens: int = -1
    heard: int | None = None
    moved: float = 0.0
    leaving: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """One actor, as it is shown to people.

    Attributes:
        number: of the actor.
        state: starting, loading, no checkpoint (it was refused), idle, or what it does; `, leaving` when it goes soon.
        node: address of its node, or None before it has started.
        pid: of its process, or None before it has started.
        tokens: tokens sampled and scored so far, as last heard; None before any answer.
    """

    number: int
    state: str
    node: str | None
    pid: int | None
    tokens: int | None


def demand_of(options: dict[str, Any]) -> dict[str, float]:
    """Resources of one actor under Ray's names, zeros left out."""
    asked = {"CPU": options.get("num_cpus", 0), "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
    return {name: float(amount) for name, amount in asked.items() if amount}


def member(number: int, worker: Worker, version: int) -> Member:
    """How an actor is shown; `version` is that of the checkpoint at hand."""
    if worker.loaded != version:
        state = "no checkpoint" if worker.reference is None else "starting" if worker.loaded < 0 else "loading"
    elif worker.task is not None:
        state = str(worker.task)
    else:
        state = "idle"
    if worker.leaving:
        state += ", leaving"
    facts = worker.facts
    return Member(number, state, facts.get("node"), facts.get("pid"), worker.heard)
