"""A rollout actor as the pool sees it: checkpoint, task and last answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_probe.cluster.actors.rollout import RolloutHandle
from ray_probe.cluster.pool.failure_policy import Decision, Doing, Limits, NoRoom
from ray_probe.run.messages import ActorFacts

ASK_AGAIN_S = 1.0


@dataclass(frozen=True)
class Event:
    """A finished task, or a fault of an actor.

    Attributes:
        actor: number of the actor.
        task: the task as given to `submit`; None when the actor was idle or starting.
        value: the task's result, or None.
        decision: what was decided about a fault; None: the task is done.
    """

    actor: int
    task: Any
    value: Any = None
    decision: Decision | None = None


@dataclass
class Worker:
    """One actor; versions count the checkpoints that the pool loaded, from 0.

    Attributes:
        handle: the actor's handle.
        had_room: the cluster had room for it when it was created.
        since: when it was created, or given its task.
        doing: starting, idle or working; idle also where it refused the checkpoint.
        heard_at: when it last lived for certain; -1: it has no process yet.
        loaded: version of the checkpoint that it has loaded.
        version: checkpoint version when the task was assigned.
        task: its task as given to `submit`; None when it is idle or starting.
        reference: Ray's reference to the result of its task or start, or None.
        heartbeat: Ray's reference to the pending answer about its tokens, or None.
        asked_at: when it was last asked for its tokens.
        tokens: tokens done at its last answer since the task was assigned; -1: no answer yet.
        heard: tokens done at its last answer; None: no answer yet.
        moved: when its tokens last grew.
        unreachable: since when it cannot be reached, and why.
        leaving: it is one too many and ends soon.
        no_room: the last observation that no node has room for it; see `waits_for_room`.
        facts: what it reported about itself.
    """

    handle: RolloutHandle
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
        """It can take a task."""
        return self.reference is None and self.unreachable is None

    @property
    def placed(self) -> bool:
        """It has a process."""
        return self.heard_at >= 0

    @property
    def waits_for_room(self) -> bool:
        """No node has room for it, and it has no process yet."""
        return self.no_room is not None and self.doing == "starting" and not self.placed

    def submit(self, task: Any, version: int, reference: Any, now: float) -> None:
        """Record the task that it was given, or (None) its start."""
        assert self.waits, "one task at a time"
        self.task, self.version, self.tokens = task, version, -1
        self.doing, self.since, self.moved = "starting" if task is None else "working", now, now
        self.reference = reference

    def ask(self, now: float, limits: Limits) -> None:
        """Ask for its tokens when an answer is due and none is pending."""
        if self.unreachable is not None:
            due = now - self.asked_at >= ASK_AGAIN_S
        elif self.reference is None:
            due = now - self.heard_at > limits.fresh_s
        else:
            due = now - max(self.since, self.moved, self.asked_at) > limits.ask_every_s
        if due and self.heartbeat is None:
            self.asked_at = now
            self.heartbeat = self.handle.tokens_done()

    def answered(self, tokens: int, as_of: float, now: float) -> None:
        """Record its answer: its tokens, and that it lived at `as_of`."""
        self.heard_at, self.heard = as_of, tokens
        if tokens != self.tokens:
            self.tokens = tokens
            self.moved = now if self.doing == "working" else self.moved

    def quiet_s(self, now: float) -> float:
        """Return the seconds without a sign of progress (see `Quiet`)."""
        if self.doing == "idle":
            return now - max(self.since, self.heard_at) if self.placed else 0.0
        return now - max(self.since, self.moved)


def demand_of(options: Mapping[str, Any]) -> dict[str, float]:
    """Return the resources of one actor under Ray's names, without zeros."""
    asked = {"CPU": options.get("num_cpus", 0), "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
    return {name: float(amount) for name, amount in asked.items() if amount}
