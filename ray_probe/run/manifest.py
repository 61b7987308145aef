"""The manifest of a run directory, and whether a run may continue from it."""

import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ray_probe.checkpoints.tokenizer.eos import KEY as EOS_KEY
from ray_probe.config.loading import config_from_dict, to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.errors import ConfigError, bad_value, cut
from ray_probe.run.messages import ActorFacts
from ray_probe.run.preparation.forward_passes import Pass, choose_pass
from ray_probe.run.preparation.prepared import CheckpointId, PreparedRun, PromptFacts
from ray_probe.system.json_object import JsonObject
from ray_probe.system.versions import package_versions

FREE_SECTIONS = ("cluster", "output", "series", "metrics", "notify")
"""Sections whose settings may change when a run continues."""


@dataclass(frozen=True, kw_only=True)
class ManifestCheckpoint(JsonObject):
    """The checkpoint of a run; see `ray_probe.run.preparation.prepared.CheckpointId`."""

    path: str = ""
    fingerprint: str
    adapter: str | None = None
    adapter_fingerprint: str
    tokenizer_from: str = "model.path"
    chat_template_from: str | None = None

    @classmethod
    def of(cls, path: str, adapter: str | None, found: CheckpointId) -> Self:
        """Return the entry of a checkpoint named by these settings."""
        return cls(
            path=path, fingerprint=found.fingerprint, adapter=adapter, adapter_fingerprint=found.adapter_fingerprint,
            tokenizer_from=found.tokenizer_from, chat_template_from=found.template_from,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Manifest(JsonObject):
    """What fixes a run's result: manifest.json.

    A run continues only where the fields without a default are there.

    Attributes:
        created: UTC time, ISO 8601.
        command: the command line.
        versions: of Python and of the packages that compute.
        platform: operating system and processor.
        device: of the actor that started first.
        threads_per_actor: of that actor.
        cluster: the Ray cluster that the run began on.
        checkpoint: with its fingerprints.
        against: the checkpoint that it is compared with; None for a gradient.
        prompts: with their digests.
        policy_id: names checkpoint, adapter, sampling policy and target.
        memory: the forecast for one actor, one line.
        pass_: one or two forward passes.
        settings: the configuration without `FREE_SECTIONS`.
        columns: of the regression, as `estimator.baseline.features` was understood.
        eos_token_ids: the ids that end a response.
        eos_source: the file or key that decided them.
        frozen_parameters: parameters that the architecture has frozen.
        seed: of the run.
        shard_plan: ids of the shards, and the prompts of each.
    """

    created: str | None = None
    command: tuple[str, ...] = ()
    versions: Mapping[str, str]
    platform: str = ""
    device: str = ""
    threads_per_actor: int
    cluster: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: ManifestCheckpoint
    prompts: PromptFacts
    policy_id: str
    memory: str = ""
    pass_: Pass
    settings: Mapping[str, Any]
    columns: tuple[str, ...]
    eos_token_ids: tuple[int, ...]
    eos_source: str = ""
    frozen_parameters: tuple[str, ...] = ()
    seed: int = 0
    shard_plan: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    against: ManifestCheckpoint | None = None

    @classmethod
    def of(
        cls, prepared: PreparedRun, actor: ActorFacts, cluster: Mapping[str, Any], command: Sequence[str] | None = None
    ) -> Self:
        """Return the manifest of a run that starts.

        Args:
            prepared: the run.
            actor: a started rollout actor.
            cluster: what is known of the cluster, in plain JSON types.
            command: the command line; None: of this process.
        """
        config, plan, prompts, checkpoint = prepared.config, prepared.plan, prepared.prompts, prepared.checkpoint
        return cls(
            created=prepared.created.isoformat(timespec="seconds"),
            command=tuple(sys.argv if command is None else command),
            versions=_versions(),
            platform=platform.platform(),
            device=actor.device,
            threads_per_actor=actor.threads,
            cluster=cluster,
            checkpoint=ManifestCheckpoint.of(config.model.path, config.model.adapter, checkpoint),
            against=None if prepared.against is None else ManifestCheckpoint.of(
                str(config.compare.against), config.compare.adapter, prepared.against
            ),
            prompts=prompts,
            policy_id=prepared.policy_id,
            memory=prepared.memory.line(),
            pass_=choose_pass(config, prepared.memory, prompts.longest_tokens, actor.spare_bytes),
            settings={name: part for name, part in to_dict(config).items() if name not in FREE_SECTIONS},
            columns=config.columns,
            eos_token_ids=prepared.eos.ids,
            eos_source=prepared.eos.source,
            frozen_parameters=tuple(actor.frozen),
            seed=config.data.seed,
            shard_plan={
                shard.id: tuple(ref.index for ref in shard.prompts)
                for number in range(plan.round_count or 0)
                for shard in plan.round(number)
            },
        )  # fmt: skip

    @classmethod
    def from_json(cls, raw: object) -> Self:
        """Read the object of manifest.json.

        Raises ConfigError where it lacks what a run needs to continue.
        """
        try:
            return super().from_json(raw)
        except ValueError as error:
            remedy = "the run was started by another version of ray_probe; start a new run"
            raise ConfigError(f"manifest.json: {error}; {remedy}") from None

    def changed_since(self, threads: int) -> list[str]:
        """Return what has changed and may change a result's last bits, one line each.

        Args:
            threads: of an actor now.
        """
        then = {**self.versions, "threads": self.threads_per_actor}
        now = {**_versions(), "threads": threads}
        return [f"{name} was {then.get(name)}, is {value}" for name, value in now.items() if then.get(name) != value]


def _versions() -> dict[str, str]:
    return package_versions() | {"python": platform.python_version()}


def check_same_inputs(prepared: PreparedRun, earlier: Manifest) -> None:
    """Refuse to continue a run whose inputs have changed. Raises ConfigError.

    Args:
        prepared: the run as it would be now.
        earlier: its manifest.
    """
    checkpoint, prompts = prepared.checkpoint, prepared.prompts
    now = {
        "model.path": (checkpoint.fingerprint, earlier.checkpoint.fingerprint),
        "model.adapter": (checkpoint.adapter_fingerprint, earlier.checkpoint.adapter_fingerprint),
        "compare.against": (_fingerprint(prepared.against), _fingerprint(earlier.against)),
        "compare.adapter": (_adapter(prepared.against), _adapter(earlier.against)),
        "data.prompts": (prompts.sha256, earlier.prompts.sha256),
        "data.chat_template": (prompts.rendered_sha256, earlier.prompts.rendered_sha256),
        EOS_KEY: (list(prepared.eos.ids), list(earlier.eos_token_ids)),
        "estimator.baseline.features": (list(prepared.config.columns), list(earlier.columns)),
        "policy_id": (prepared.policy_id, earlier.policy_id),
    }
    changed = changed_settings(prepared.config, config_from_dict(earlier.settings, "manifest.json"))
    if changed:
        more = f" (and {len(changed) - 1} more: {', '.join(changed[1:])})" if len(changed) > 1 else ""
        raise ConfigError(f"{changed[0]}; restore it, or start a new run{more}")
    for key, (current, before) in now.items():
        if current != before:
            now_shown, then_shown = (value[:12] if isinstance(value, str) else value for value in (current, before))
            remedy = f"its content was {then_shown} when the run was started; restore it, or start a new run"
            raise ConfigError(bad_value(key, now_shown, remedy))


def _fingerprint(found: CheckpointId | ManifestCheckpoint | None) -> str:
    return "" if found is None else found.fingerprint


def _adapter(found: CheckpointId | ManifestCheckpoint | None) -> str:
    return "" if found is None else found.adapter_fingerprint


def changed_settings(now: ProbeConfig, before: ProbeConfig) -> list[str]:
    """Return one line for each setting that must stay and differs, with both values.

    A list of prompts is shown by its length: messages quote no prompt.
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
