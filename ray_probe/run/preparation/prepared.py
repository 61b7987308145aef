"""A run that can start, with nothing loaded: no torch, no transformers.

The driver sends a `PreparedRun` to the controller, which assigns shards and writes results.
"""

import hashlib
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ray_probe.checkpoints.memory_forecast import MemoryDemand
from ray_probe.checkpoints.tokenizer.eos import Eos
from ray_probe.config.schema import ProbeConfig
from ray_probe.core.estimator.baselines import BaselineRule
from ray_probe.core.estimator.change import SIDES
from ray_probe.run.preparation.plan import Plan
from ray_probe.system.json_object import JsonObject


@dataclass(frozen=True)
class CheckpointId:
    """The identity of a checkpoint.

    Attributes:
        directory: of the checkpoint.
        fingerprint: sha256 of its files, hexadecimal.
        adapter: directory of the adapter, or None.
        adapter_fingerprint: sha256 of the adapter's files, hexadecimal; empty without one.
        tokenizer_from: config key of the directory that the tokenizer is taken from.
        template_from: config key of the directory that the chat template is taken from; None without one.
    """

    directory: Path
    fingerprint: str
    adapter: Path | None
    adapter_fingerprint: str
    tokenizer_from: str = "model.path"
    template_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class PromptFacts(JsonObject):
    """Facts about the prompts, without their texts, as the manifest holds them.

    Attributes:
        source: the file, the data set, or `<list>`.
        sha256: over ids and prompts in order.
        rendered_sha256: over the prompts as the chat template renders them; None without a template.
        count: prompts of the source.
        skipped_as_too_long: prompts that are not used.
        longest_tokens: of a prompt in use.
        ending_with_eos: prompts in use that end with an EOS token of their own text or of the chat template.
    """

    source: str = ""
    sha256: str
    rendered_sha256: str | None
    count: int = 0
    skipped_as_too_long: int = 0
    longest_tokens: int = 0
    ending_with_eos: int = 0


@dataclass(frozen=True)
class PreparedRun:
    """A run that can start; only the texts of its prompts make its pickle large.

    Attributes:
        config: with absolute paths.
        checkpoint: inspected, weights not loaded.
        prompts: facts about them.
        plan: rounds of shards, with the texts of the prompts.
        policy_id: names checkpoint, adapter, sampling policy and target (x_estimator_mode) on every record and beta.
        created: when the run was created, UTC, whole seconds.
        memory: what an actor needs on its device.
        eos: the ids that end a response, and their source.
        against: of a comparison, the checkpoint A; None for a gradient.
    """

    config: ProbeConfig
    checkpoint: CheckpointId
    prompts: PromptFacts
    plan: Plan
    policy_id: str
    created: datetime
    memory: MemoryDemand
    eos: Eos
    against: CheckpointId | None = None

    @property
    def plan_id(self) -> str:
        """Name of the prompts and their order, which give a shard's number its meaning."""
        batch = self.config.batch
        dealt = (self.config.data.seed, batch.prompts_per_round, batch.responses_per_prompt, batch.shard_prompts)
        prompts = (self.prompts.sha256, self.prompts.rendered_sha256, self.prompts.skipped_as_too_long)
        return hashlib.sha256(repr((dealt, prompts)).encode()).hexdigest()[:16]


def few_shards(config: ProbeConfig, actors: int | None = None) -> str | None:
    """Return a warning where a round has fewer than two shards an actor.

    Actors then wait for the slowest shard.

    Args:
        config: of the run.
        actors: number of actors; None: as configured.
    """
    batch, actors = config.batch, config.cluster.actors if actors is None else actors
    shards, needed = math.ceil(batch.prompts_per_round / batch.shard_prompts), 2 * actors
    if shards >= needed:
        return None
    size = batch.prompts_per_round // needed
    smaller = f"set batch.shard_prompts to {size} or less, or " if size else ""
    return (
        f"a round has {shards} shards for {actors} actors, fewer than two each: actors will wait; {smaller}"
        f"raise batch.prompts_per_round to {needed * batch.shard_prompts} or more"
    )


def baseline_rule(config: ProbeConfig) -> BaselineRule:
    """Return the baseline of a configuration."""
    baseline = config.estimator.baseline
    return BaselineRule(
        baseline.mode, baseline.fit, baseline.ridge_lambda, baseline.ema_decay, config.columns,
        config.generation.max_new_tokens, targets=1 if config.compare.against is None else len(SIDES),
    )  # fmt: skip
