"""The manifest of a run directory, and whether a run may go on from it."""

import platform
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ray_probe.checkpoints.tokenizer.eos import KEY as EOS_KEY
from ray_probe.config.loading import config_from_dict, to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.errors import ConfigError, bad_value, cut
from ray_probe.run.forward_passes import choose_pass
from ray_probe.run.prepared import PreparedRun
from ray_probe.system.versions import package_versions

FREE_SECTIONS = ("cluster", "output")
"""Sections whose settings may change when a run goes on."""


def manifest(prepared: PreparedRun, actor: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
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


def check_same_inputs(prepared: PreparedRun, earlier: dict[str, Any]) -> None:
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
