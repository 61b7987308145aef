"""One forward pass a response, its graph held until its baseline is there, or two: chosen once a run, from memory.

With two passes nothing outlives a micro-batch but what was found of its nuclei: up to 64 MB. With one, graphs of the
shards that wait for their fit are held; what there is no room for is scored twice, which gives the same record to the
bit and the same gradient to rounding. With `fit: lagged` the fit is there before the shard, so one shard's graphs are
all that is ever held.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ray_probe.checkpoints.memory_forecast import MemoryDemand, size
from ray_probe.config import ProbeConfig


@dataclass(frozen=True)
class Pass:
    """What was chosen, for the manifest.

    Attributes:
        name: one or two.
        held_positions: of whose tokens an actor holds graphs, at most; 0 with two passes.
        why: in one line.
    """

    name: str
    held_positions: int
    why: str

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Pass":
        """What `to_json` gave."""
        return cls(**raw)


def held_room(config: ProbeConfig, memory: MemoryDemand, spare_bytes: int) -> int:
    """Positions whose graphs an actor may hold in so many bytes, or in those that are configured."""
    asked = config.estimator.memory_budget_gb
    budget = spare_bytes if asked is None else int(asked * 1e9)
    return budget // max(1, memory.held_a_position)


def choose_pass(config: ProbeConfig, memory: MemoryDemand, longest_prompt: int, spare_bytes: int) -> Pass:
    """How many passes, for the whole run.

    Args:
        config: the run's configuration.
        memory: what an actor needs on its device without held graphs.
        longest_prompt: of the run, in tokens.
        spare_bytes: memory of an actor that held graphs may take, as the first actor has found it; each keeps to its
            own beside.
    """
    estimator, batch = config.estimator, config.batch
    room = held_room(config, memory, spare_bytes)
    if memory.unknown and estimator.pass_ == "auto":
        return Pass("two", 0, memory.unknown)
    shards = math.ceil(batch.prompts_per_round / batch.shard_prompts)
    waiting = 1 if estimator.baseline.fit == "lagged" else math.ceil(shards / config.cluster.actors)
    shard = batch.shard_prompts * batch.responses_per_prompt * (longest_prompt + config.generation.max_new_tokens)
    needed = waiting * shard * memory.held_a_position
    there = size(room * memory.held_a_position)
    fits = f"the graphs of {waiting} shards at their longest take {size(needed)}, there is room for {there}"
    if estimator.pass_ == "one":
        return Pass("one", room, f"as configured; {memory.unknown or fits}")
    if estimator.pass_ == "auto" and memory.held_a_batch:
        return Pass("two", 0, f"each micro-batch's graph holds a copy of fused experts, {size(memory.held_a_batch)}")
    if estimator.pass_ == "auto" and room >= waiting * shard:
        return Pass("one", room, fits)
    return Pass("two", 0, "as configured" if estimator.pass_ == "two" else fits)
