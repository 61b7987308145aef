"""A rollout actor as the pool sees it: what it has loaded, what it was given to do, when it was last heard of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_probe.cluster.pool.failure_policy import Decision, Doing, Limits, NoRoom
from ray_probe.run.messages import ActorFacts

ASK_AGAIN_S = 1.0


@dataclass(frozen=True)
class Event:
    """Something that an actor's task came to, or its end.

    Attributes:
        actor: number of the actor.
        task: what it had been asked, as given to `submit`; None when it was idle or starting.
        value: the task's result, or None.
        decision: what was decided about a fault; None: the task is done.
    """

    actor: int
    task: Any
    value: Any = None
    decision: Decision | None = None


@dataclass
class Worker:
    """One actor. Versions count the checkpoints that the pool was told to load; -1 is none.

    Attributes:
        handle: of Ray.
        had_room: there was room for it when it was made.
        since: when it was made, or given what it does.
        doing: what it is about; idle too where it was refused the checkpoint.
        heard_at: when it is known to have lived; -1: it has no process yet.
        loaded: version of the checkpoint that it has loaded.
        version: version that was at hand when it was given what it does.
        task: what it does, as given to `submit`; None when it is idle or starting.
        reference: what it does, for Ray.
        heartbeat: the question that it has not answered, for Ray.
        asked_at: when it was last asked.
        tokens: tokens done as last heard since it was given what it does; -1: not heard.
        heard: tokens done as last heard at all.
        moved: when there was a token more.
        unreachable: since when it cannot be reached, and why.
        leaving: it goes soon.
        no_room: that no node has room for it, as last seen; see `waits_for_room`.
        facts: what it reported of itself; None before it has loaded a checkpoint.
    """

    handle: Any
    had_room: bool
    since: float
    doing: Doing = "idle"
    heard_at: float = -1.0
    loaded: int = -1
    version: int = -1
    task: Any = None
    reference: Any = None
    heartbeat: Any = None
    asked_at: float = 0.0
    tokens: int = -1
    heard: int | None = None
    moved: float = 0.0
    unreachable: tuple[float, str] | None = None
    leaving: bool = False
    no_room: NoRoom | None = None
    facts: ActorFacts | None = None

    @property
    def waits(self) -> bool:
        """It can be given something to do."""
        return self.reference is None and self.unreachable is None

    @property
    def placed(self) -> bool:
        """It has a process."""
        return self.heard_at >= 0

    @property
    def waits_for_room(self) -> bool:
        """No node has room for it, and it has no process yet."""
        return self.no_room is not None and self.doing == "starting" and not self.placed

    def submit(self, task: Any, version: int, method: str, args: Sequence[Any], now: float) -> None:
        """Give it something to do."""
        assert self.waits, "one task at a time"
        self.task, self.version, self.tokens = task, version, -1
        self.doing, self.since, self.moved = "starting" if task is None else "working", now, now
        self.reference = getattr(self.handle, method).remote(*args)

    def ask(self, now: float, limits: Limits) -> None:
        """Ask for its tokens, where it was not heard of for a while and no question is open."""
        if self.unreachable is not None:
            due = now - self.asked_at >= ASK_AGAIN_S
        elif self.reference is None:
            due = now - self.heard_at > limits.fresh_s
        else:
            due = now - max(self.since, self.moved, self.asked_at) > limits.ask_every_s
        if due and self.heartbeat is None:
            self.asked_at = now
            self.heartbeat = self.handle.tokens_done.remote()

    def answered(self, tokens: int, as_of: float, now: float) -> None:
        """It said how many tokens it has done; it lived at `as_of`."""
        self.heard_at, self.heard = as_of, tokens
        if tokens != self.tokens:
            self.tokens = tokens
            self.moved = now if self.doing == "working" else self.moved

    def quiet_s(self, now: float) -> float:
        """Seconds without what shows that it is well (see `Quiet`); nothing is said of one that waits for a process."""
        if self.doing == "idle":
            return now - max(self.since, self.heard_at) if self.placed else 0.0
        return now - max(self.since, self.moved)


@dataclass(frozen=True)
class Member:
    """One actor, as it is shown to people.

    Attributes:
        number: of the actor.
        state: starting, loading, no checkpoint (it was refused), idle, or what it does; `, not reachable` and
            `, leaving` where that is so.
        node: address of its node, or None before it has started.
        pid: of its process, or None before it has started.
        tokens: tokens sampled and scored so far, as last heard; None before any answer.
    """

    number: int
    state: str
    node: str | None
    pid: int | None
    tokens: int | None


def demand_of(options: Mapping[str, Any]) -> dict[str, float]:
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
    state += ", not reachable" if worker.unreachable is not None else ""
    state += ", leaving" if worker.leaving else ""
    facts = worker.facts
    node, pid = (None, None) if facts is None else (facts.node, facts.pid)
    return Member(number, state, node, pid, worker.heard)
