"""The choice of one or two forward passes per response, once per run, from memory.

With two passes only cached nuclei outlive a micro-batch, up to 64 MB. With one pass an actor holds the graphs of shards
that wait for their fit; it scores responses twice where a graph has no room, which gives the same record to the bit and
the same gradient to rounding. With `fit: lagged` the fit exists before the shard, so an actor holds one shard's graphs.
"""

import math
from dataclasses import dataclass

from ray_probe.checkpoints.memory_forecast import MemoryDemand, size
from ray_probe.config import ProbeConfig
from ray_probe.system.json_object import JsonObject


@dataclass(frozen=True)
class Pass(JsonObject):
    """The choice, as the manifest holds it.

    Attributes:
        name: one or two.
        held_positions: most tokens whose graphs an actor holds; 0 with two passes.
        why: the reason, one line.
    """

    name: str
    held_positions: int
    why: str


def held_room(config: ProbeConfig, memory: MemoryDemand, spare_bytes: int) -> int:
    """Return the positions whose graphs fit into the configured or spare memory."""
    asked = config.estimator.memory_budget_gb
    budget = spare_bytes if asked is None else int(asked * 1e9)
    return budget // max(1, memory.held_a_position)


def choose_pass(config: ProbeConfig, memory: MemoryDemand, longest_prompt: int, spare_bytes: int) -> Pass:
    """Choose the number of passes for the whole run.

    Args:
        config: the run's configuration.
        memory: what an actor needs on its device without held graphs.
        longest_prompt: of the run, in tokens.
        spare_bytes: memory for held graphs that the first actor found; every actor keeps to its own limit too.
    """
    estimator, batch = config.estimator, config.batch
    if config.compare.against is not None:
        also = "; the midpoint's own once more with gradient" if config.compare.parts else ""
        return Pass("two", 0, f"a comparison scores each response once under each checkpoint, without gradient{also}")
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
