"""Who does what next in a round: pure decisions, no Ray, no clock.

A shard is collected (its record reaches the fitter), then, once the fit is there, accumulated by the actor that holds
its tokens. When an actor is lost, every shard whose gradient it had not committed is done again by another; records
that are in stay in. A shard that keeps failing is given up after `MAX_ATTEMPTS`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ray_probe.plan import Shard

MAX_ATTEMPTS = 3

State = Literal["waiting", "collecting", "held", "accumulating", "accumulated", "given_up"]


@dataclass(frozen=True)
class Task:
    """One thing for an actor to do."""

    kind: Literal["collect", "accumulate"]
    shard: Shard


@dataclass
class _Entry:
    shard: Shard
    state: State = "waiting"
    actor: int | None = None
    record_in: bool = False
    failed_on: set[int] = field(default_factory=set)
    causes: list[str] = field(default_factory=list)


class RoundSchedule:
    """State of one round's shards.

    Args:
        shards: the round's shards, in canonical order.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._entries = {shard.index: _Entry(shard) for shard in shards}
        self.fit_ready = False
        self.retried = 0

    @property
    def records_complete(self) -> bool:
        """Every shard's record is in, but for those given up."""
        return all(entry.record_in or entry.state == "given_up" for entry in self._entries.values())

    @property
    def complete(self) -> bool:
        """Every shard's gradient is in an actor's sum, but for those given up."""
        return all(entry.state in ("accumulated", "given_up") for entry in self._entries.values())

    @property
    def records(self) -> list[int]:
        """Shards whose record is in."""
        return [index for index, entry in self._entries.items() if entry.record_in]

    @property
    def given_up(self) -> dict[str, str]:
        """Ids of the shards given up, with the last cause."""
        return {e.shard.id: e.causes[-1] for e in self._entries.values() if e.state == "given_up"}

    def accumulated_by(self) -> dict[int, tuple[int, ...]]:
        """Actor -> the shards whose gradient is in its sum, ascending."""
        result: dict[int, tuple[int, ...]] = {}
        for index, entry in sorted(self._entries.items()):
            if entry.state == "accumulated" and entry.actor is not None:
                result[entry.actor] = (*result.get(entry.actor, ()), index)
        return result

    def next_task(self, actor: int, alive: Collection[int] = ()) -> Task | None:
        """What an idle actor does next: a gradient for a shard that it holds, else a shard that waits.

        Args:
            actor: the idle actor.
            alive: all actors that work. A shard that failed on this one is left to another of them that has not
                tried it, so that one bad actor cannot use up every shard's attempts.
        """
        if self.fit_ready:
            for entry in self._entries.values():
                if entry.state == "held" and entry.actor == actor:
                    entry.state = "accumulating"
                    return Task("accumulate", entry.shard)
        for entry in self._entries.values():
            fresh = set(alive) - entry.failed_on
            if entry.state == "waiting" and (actor not in entry.failed_on or not fresh):
                entry.state, entry.actor = "collecting", actor
                return Task("collect", entry.shard)
        return None

    def collected(self, shard: Shard) -> bool:
        """The shard's record reached the fitter; returns whether it had been in before."""
        entry = self._entries[shard.index]
        again, entry.record_in, entry.state = entry.record_in, True, "held"
        return again

    def accumulated(self, shard: Shard) -> None:
        """The shard's gradient is in its actor's sum."""
        self._entries[shard.index].state = "accumulated"

    def failed(self, shard: Shard, cause: str) -> bool:
        """The shard's task failed; returns whether the shard is given up."""
        entry = self._entries[shard.index]
        entry.causes.append(cause)
        if entry.actor is not None:
            entry.failed_on.add(entry.actor)
        if len(entry.causes) >= MAX_ATTEMPTS:
            entry.state, entry.actor = "given_up", None
            return True
        self._requeue(entry)
        return False

    def actor_lost(self, actor: int) -> int:
        """Requeue everything that only this actor had; returns how many gradients are lost with it."""
        lost = 0
        for entry in self._entries.values():
            if entry.actor == actor and entry.state not in ("waiting", "given_up"):
                lost += entry.state == "accumulated"
                self._requeue(entry)
        return lost

    def _requeue(self, entry: _Entry) -> None:
        entry.state, entry.actor = "waiting", None
        self.retried += 1
