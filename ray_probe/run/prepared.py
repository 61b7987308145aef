"""A run that can start, what it leaves in its manifest, and whether it may go on: no torch, no transformers.

A `Prepared` travels: it holds what a process that deals out shards and writes results needs, and nothing loaded.
"""

import hashlib
import math
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ray_probe.checkpoints.eos import KEY as EOS_KEY
from ray_probe.checkpoints.eos import EosIds
from ray_probe.checkpoints.memory_forecast import MemoryDemand
from ray_probe.config.schema import ProbeConfig, config_from_dict, to_dict
from ray_probe.data.rows import cut
from ray_probe.errors import ConfigError, bad_value
from ray_probe.run.forward_passes import choose_pass
from ray_probe.run.plan import Plan
from ray_probe.system.versions import package_versions

FREE_SECTIONS = ("cluster", "output")
"""Sections whose settings may change when a run goes on."""


@dataclass(frozen=True)
class CheckpointId:
    """Which checkpoint, without anything loaded from it.

    Attributes:
        directory: where it lies.
        fingerprint: sha256 of its files, hexadecimal.
        adapter: where the adapter on it lies, or None.
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


@dataclass(frozen=True)
class PromptFacts:
    """Which prompts, without the prompts.

    Attributes:
        source: the file, the data set, or `<list>`.
        sha256: over ids and prompts in order.
        rendered_sha256: over what the chat template made of them; None without a template.
        count: prompts of the source.
        skipped: those left out as too long.
        longest: tokens of the longest that is used.
        after_eos: those in use that end with an EOS token of their own text or of the chat template.
    """

    source: str
    sha256: str
    rendered_sha256: str | None
    count: int
    skipped: int
    longest: int
    after_eos: int = 0


@dataclass(frozen=True)
class Prepared:
    """A run that can start; it pickles small but for the texts of its prompts.

    Attributes:
        config: with absolute paths.
        checkpoint: inspected, weights not loaded.
        prompts: what is known of them.
        plan: rounds of shards, with the texts of the prompts.
        policy_id: names checkpoint, adapter, sampling policy and target (x_estimator_mode) on every record and beta.
        created: when the run was created, UTC, whole seconds.
        memory: what an actor needs on its device.
        eos: the ids that end a response, and where they come from.
    """

    config: ProbeConfig
    checkpoint: CheckpointId
    prompts: PromptFacts
    plan: Plan
    policy_id: str
    created: datetime
    memory: MemoryDemand
    eos: EosIds

    @property
    def plan_id(self) -> str:
        """Names the prompts and how they are dealt out: what a shard's number stands for."""
        batch = self.config.batch
        dealt = (self.config.data.seed, batch.prompts_per_round, batch.responses_per_prompt, batch.shard_prompts)
        prompts = (self.prompts.sha256, self.prompts.rendered_sha256, self.prompts.skipped)
        return hashlib.sha256(repr((dealt, prompts)).encode()).hexdigest()[:16]


def manifest(prepared: Prepared, actor: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
    """What fixes a run's result, for manifest.json (spec section 9).

    Args:
        prepared: the run.
        actor: what a started rollout actor said of itself.
        cluster: what is known of the cluster.
    """
    config, plan, prompts, checkpoint = prepared.config, prepared.plan, prepared.prompts, prepared.checkpoint
    return {
        "created": prepared.created.isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": package_versions() | {"python": platform.python_version()},
        "platform": platform.platform(),
        "device": actor["device"],
        "threads_per_actor": actor["threads"],
        "cluster": cluster,
        "checkpoint": {
            "path": config.model.path,
            "fingerprint": checkpoint.fingerprint,
            "adapter": config.model.adapter,
            "adapter_fingerprint": checkpoint.adapter_fingerprint,
            "tokenizer_from": checkpoint.tokenizer_from,
            "chat_template_from": checkpoint.template_from,
        },
        "prompts": {
            "source": prompts.source,
            "sha256": prompts.sha256,
            "rendered_sha256": prompts.rendered_sha256,
            "count": prompts.count,
            "skipped_as_too_long": prompts.skipped,
            "longest_tokens": prompts.longest,
            "ending_with_eos": prompts.after_eos,
        },
        "policy_id": prepared.policy_id,
        "memory": prepared.memory.line(),
        "pass": choose_pass(config, prepared.memory, prompts.longest, actor["spare_bytes"]).to_json(),
        "settings": {name: part for name, part in to_dict(config).items() if name not in FREE_SECTIONS},
        "eos_token_ids": list(prepared.eos.ids),
        "eos_source": prepared.eos.source,
        "frozen_parameters": list(actor["frozen"]),
        "seed": config.data.seed,
        "shard_plan": {
            shard.id: [ref.index for ref in shard.prompts]
            for n in range(plan.round_count or 0)
            for shard in plan.round(n)
        },
    }


def check_same_inputs(prepared: Prepared, earlier: dict[str, Any]) -> None:
    """Refuse to go on with a run whose inputs have changed. Raises ConfigError.

    Args:
        prepared: the run as it would be now.
        earlier: its manifest.json.
    """
    try:
        settings, checkpoint, prompts = earlier["settings"], earlier["checkpoint"], earlier["prompts"]
        earlier["pass"]
        now = {
            "model.path": (prepared.checkpoint.fingerprint, checkpoint["fingerprint"]),
            "model.adapter": (prepared.checkpoint.adapter_fingerprint, checkpoint["adapter_fingerprint"]),
            "data.prompts": (prepared.prompts.sha256, prompts["sha256"]),
            "data.chat_template": (prepared.prompts.rendered_sha256, prompts["rendered_sha256"]),
            EOS_KEY: (list(prepared.eos.ids), earlier["eos_token_ids"]),
            "policy_id": (prepared.policy_id, earlier["policy_id"]),
        }
    except KeyError as missing:
        remedy = "the run was started by another version of ray_probe; start a new run"
        raise ConfigError(f"manifest.json: has no {missing}; {remedy}") from None
    changed = changed_settings(prepared.config, config_from_dict(settings, "manifest.json"))
    if changed:
        more = f" (and {len(changed) - 1} more: {', '.join(changed[1:])})" if len(changed) > 1 else ""
        raise ConfigError(f"{changed[0]}; restore it, or start a new run{more}")
    for field, (current, before) in now.items():
        if current != before:
            now_shown, then_shown = (value[:12] if isinstance(value, str) else value for value in (current, before))
            remedy = f"its content was {then_shown} when the run was started; restore it, or start a new run"
            raise ConfigError(bad_value(field, now_shown, remedy))


def changed_settings(now: ProbeConfig, before: ProbeConfig) -> list[str]:
    """What differs between two configs and must not when a run goes on: one line a key, with both values.

    A list of prompts is told by its length alone: messages quote no prompt.
    """
    earlier = dict(_fixed(before))
    return [
        bad_value(key, value, f"the run was started with {cut(repr(earlier[key]))}")
        for key, value in _fixed(now)
        if value != earlier[key]
    ]


def _fixed(config: ProbeConfig) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of the settings that must stay."""
    for section, settings in to_dict(config).items():
        if section not in FREE_SECTIONS:
            yield from _leaves(settings, section)


def _leaves(settings: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        key = f"{path}.{name}"
        if isinstance(value, dict):
            yield from _leaves(value, key)
        else:
            yield key, f"a list of {len(value)}" if key == "data.prompts" and isinstance(value, list) else value


def changed_since(earlier: dict[str, Any], threads: int) -> list[str]:
    """What else fixes a result's bits and differs from the manifest of an earlier start, one line each."""
    now = package_versions() | {"python": platform.python_version()}
    then = earlier["versions"] | {"threads": earlier["threads_per_actor"]}
    return [f"{name} was {then.get(name)}, is {value}" for name, value in (now | {"threads": threads}).items()
            if then.get(name) != value]  # fmt: skip


def few_shards(config: ProbeConfig, actors: int | None = None) -> str | None:
    """A warning where a round has fewer than two shards an actor, so that actors wait for the slowest shard.

    Args:
        config: the run's.
        actors: how many there will be; None: as many as the config asks for.
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
