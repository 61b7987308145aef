"""What a rollout keeps of the shards of a commit group."""

from typing import Generic, Protocol, TypeVar

from ray_probe.core.estimator.records import Record
from ray_probe.errors import ShardError
from ray_probe.run.messages import Receipt, ShardKey, ShardSums
from ray_probe.run.preparation.plan import Shard


class WithRecord(Protocol):
    """What is held of a shard that waits for its fit."""

    record: Record


HeldT = TypeVar("HeldT", bound=WithRecord)


class GroupShards(Generic[HeldT]):
    """The shards of one commit group on an actor.

    They are held until their fit is there, then summed.

    Attributes:
        held: shards that wait for their fit.
        added: the sums of the others.
    """

    def __init__(self) -> None:
        self._group = ""
        self.held: dict[ShardKey, HeldT] = {}
        self.added: dict[ShardKey, ShardSums] = {}

    def begin(self, group: str) -> bool:
        """Drop everything of an earlier group; returns whether this one is new."""
        if group == self._group:
            return False
        self._group = group
        self.held, self.added = {}, {}
        return True

    def acknowledge(self, shard: Shard, receipt: Receipt) -> None:
        """Hold the record that the fitter counts: it is left out of this shard's fit."""
        if receipt.kept is not None:
            self.held[shard.key].record = Record.unpack(receipt.kept).without_prompts()

    def waiting(self, shard: Shard) -> HeldT:
        """Return what is held of a shard.

        Raises ShardError where it was not collected here.
        """
        if shard.key not in self.held:
            raise ShardError(f"{shard.label}: was not collected here; collect it first")
        return self.held[shard.key]

    def finish(self, shard: Shard, sums: ShardSums) -> ShardSums:
        """Keep the sums of a shard in the place of what was held; returns them."""
        self.added[shard.key] = sums
        del self.held[shard.key]
        return sums

    def of(self, group: str) -> tuple[ShardKey, ...]:
        """Return the summed shards of this group, ascending; none of another group."""
        return tuple(sorted(self.added)) if group == self._group else ()
