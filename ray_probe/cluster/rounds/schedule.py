"""Decides which actor does which task in a commit group. Pure, no Ray, no clock.

A shard is collected (its record reaches the fitter). Once its round is fitted, the actor that holds its tokens
accumulates its gradient. When an actor is lost, every shard whose gradient was not committed is retried by another
actor, in earlier rounds too; records that the fitter has stay there. A shard is given up after `MAX_ATTEMPTS` failures
that are charged to it (see `ray_probe.cluster.pool.failure_policy`).
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ray_probe.cluster.pool.failure_policy import LESS_MEMORY, MAX_ATTEMPTS, Blame, is_charged
from ray_probe.run.messages import ShardKey
from ray_probe.run.preparation.plan import Shard

State = Literal["waiting", "collecting", "held", "accumulating", "accumulated", "given_up"]


@dataclass(frozen=True)
class Task:
    """One task for an actor."""

    kind: Literal["collect", "accumulate"]
    shard: Shard

    def __str__(self) -> str:
        return f"{self.kind} {self.shard.id}"


@dataclass
class _Entry:
    shard: Shard
    state: State = "waiting"
    actor: int | None = None
    record_in: bool = False
    failed_on: set[int] = field(default_factory=set)
    causes: list[str] = field(default_factory=list)
    by_memory: int = 0
    spared: int = 0


class Schedule:
    """The state of the shards of all rounds since the last commit."""

    def __init__(self) -> None:
        self._entries: dict[ShardKey, _Entry] = {}
        self._fitted: set[int] = set()
        self.retried: Counter[int] = Counter()
        """Retries of shards, by round."""

    def open_round(self, shards: Sequence[Shard]) -> None:
        """Add a round's shards, in canonical order."""
        self._entries |= {shard.key: _Entry(shard) for shard in shards}

    def fit_ready(self, number: int) -> None:
        """Record that the fit of this round's gradients is published."""
        self._fitted.add(number)

    @property
    def complete(self) -> bool:
        """Whether every shard that was not given up is in an actor's sum."""
        return all(entry.state in ("accumulated", "given_up") for entry in self._entries.values())

    def records_complete(self, number: int) -> bool:
        """Whether every record of the round is in, except of shards given up."""
        return all(entry.record_in or entry.state == "given_up" for entry in self._of(number))

    def records(self, number: int) -> list[int]:
        """Return the shards of the round whose record is in."""
        return [entry.shard.index for entry in self._of(number) if entry.record_in]

    def given_up(self, number: int) -> dict[str, str]:
        """Return ids and last causes of the round's shards that were given up."""
        return {entry.shard.id: entry.causes[-1] for entry in self._of(number) if entry.state == "given_up"}

    def accumulated_by(self) -> dict[int, tuple[ShardKey, ...]]:
        """Return by actor the shards whose gradient is in its sum, ascending."""
        result: dict[int, tuple[ShardKey, ...]] = {}
        for key, entry in sorted(self._entries.items()):
            if entry.state == "accumulated" and entry.actor is not None:
                result[entry.actor] = (*result.get(entry.actor, ()), key)
        return result

    def depends_on(self, actor: int) -> bool:
        """Whether the actor works on, holds or has summed a shard."""
        return any(entry.actor == actor for entry in self._entries.values())

    def next_task(self, actor: int, alive: Collection[int] = (), leaving: bool = False) -> Task | None:
        """Return an idle actor's next task: a held shard's gradient, else a new shard.

        Args:
            actor: the idle actor.
            alive: all live actors.
            leaving: the actor finishes the shards that it holds and takes no other.
        """
        for entry in self._entries.values():
            if entry.state == "held" and entry.actor == actor and entry.shard.round in self._fitted:
                entry.state = "accumulating"
                return Task("accumulate", entry.shard)
        for entry in self._entries.values():
            # A shard that failed here goes to an actor that has not tried it, so that one bad actor cannot use up
            # every shard's attempts.
            fresh = set(alive) - entry.failed_on
            if entry.state == "waiting" and not leaving and (actor not in entry.failed_on or not fresh):
                entry.state, entry.actor = "collecting", actor
                return Task("collect", entry.shard)
        return None

    def collected(self, shard: Shard) -> bool:
        """Record that the fitter has the record; returns whether it had it before."""
        entry = self._entries[shard.key]
        again, entry.record_in, entry.state = entry.record_in, True, "held"
        return again

    def accumulated(self, shard: Shard) -> None:
        """Record that the shard's gradient is in its actor's sum."""
        self._entries[shard.key].state = "accumulated"

    def failed(self, shard: Shard, cause: str, blame: Blame = "charged", by_memory: bool = False) -> str:
        """Requeue a shard whose task failed, or give it up. Returns a line for the log.

        Args:
            shard: the shard.
            cause: why, in one line.
            blame: whether the failure is charged.
            by_memory: memory seems to have run out.
        """
        entry = self._entries[shard.key]
        if not is_charged(blame, entry.spared):
            entry.spared += 1
            self._requeue(entry)
            return f"{shard.label} interrupted ({cause}); rescheduled, not counted as an attempt"
        entry.causes.append(cause)
        entry.by_memory += by_memory
        if entry.actor is not None:
            entry.failed_on.add(entry.actor)
        failed = f"{shard.label} failed ({cause}); it is"
        if len(entry.causes) < MAX_ATTEMPTS:
            self._requeue(entry)
            return f"{failed} tried again"
        entry.state, entry.actor = "given_up", None
        hint = f"; each time as if memory had run out: {LESS_MEMORY}" if entry.by_memory == MAX_ATTEMPTS else ""
        return f"{failed} given up after {MAX_ATTEMPTS} attempts{hint}"

    def actor_lost(self, actor: int) -> Counter[int]:
        """Requeue a lost actor's shards; returns the lost gradients by round."""
        lost: Counter[int] = Counter()
        for entry in self._entries.values():
            if entry.actor == actor and entry.state not in ("waiting", "given_up"):
                lost[entry.shard.round] += entry.state == "accumulated"
                self._requeue(entry)
        return lost

    def _of(self, number: int) -> list[_Entry]:
        return [entry for entry in self._entries.values() if entry.shard.round == number]

    def _requeue(self, entry: _Entry) -> None:
        entry.state, entry.actor = "waiting", None
        self.retried[entry.shard.round] += 1
