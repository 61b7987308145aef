"""What can be known of a run before a cluster is touched: files checked, paths resolved, prompts measured, the plan."""

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_probe.checkpoints import Checkpoint, inspect_checkpoint
from ray_probe.config import ProbeConfig, to_dict
from ray_probe.errors import ConfigError, PromptsError, bad_value
from ray_probe.plan import Plan
from ray_probe.prompts import PromptSet, load_prompts
from ray_probe.sequence_processor import context_length
from ray_probe.versions import package_versions

TOKENIZE_BATCH = 10_000


@dataclass(frozen=True)
class Prepared:
    """A run that can start.

    Attributes:
        config: with absolute paths.
        checkpoint: inspected, weights not loaded.
        prompts: all prompts of the file.
        skipped: prompts left out as too long.
        plan: rounds of shards.
        policy_id: names checkpoint, sampling policy and target (x_estimator_mode) on every record and beta.
    """

    config: ProbeConfig
    checkpoint: Checkpoint
    prompts: PromptSet
    skipped: int
    plan: Plan
    policy_id: str


def prepare(config: ProbeConfig) -> Prepared:
    """Check files and sizes. Raises an InputError with one line for what is wrong."""
    checkpoint = inspect_checkpoint(config.model)
    prompts = load_prompts(config.data.prompts, config.data.field)
    resolved = _absolute(config, checkpoint)
    usable = _usable(config, checkpoint, prompts)
    batch = config.batch
    plan = Plan(
        prompts.texts, usable, config.data.seed, batch.prompts_per_round, batch.responses_per_prompt,
        batch.shard_prompts, _rounds(config), config.data.repeat,
    )  # fmt: skip
    return Prepared(resolved, checkpoint, prompts, len(prompts) - len(usable), plan, _policy_id(config, checkpoint))


def manifest(prepared: Prepared, actor: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
    """What fixes a run's result, for manifest.json (spec section 9).

    Args:
        prepared: the run.
        actor: what a started rollout actor said of itself.
        cluster: what is known of the cluster.
    """
    config, plan = prepared.config, prepared.plan
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": package_versions() | {"python": platform.python_version()},
        "platform": platform.platform(),
        "device": actor["device"],
        "threads_per_actor": actor["threads"],
        "cluster": cluster,
        "checkpoint": {"path": str(prepared.checkpoint.directory), "fingerprint": prepared.checkpoint.fingerprint},
        "prompts": {
            "source": prepared.prompts.source,
            "sha256": prepared.prompts.sha256,
            "count": len(prepared.prompts),
            "skipped_as_too_long": prepared.skipped,
        },
        "policy_id": prepared.policy_id,
        "config_sha256": _config_sha256(config),
        "eos_token_ids": list(actor["eos_ids"]),
        "seed": config.data.seed,
        "shard_plan": {
            shard.id: [ref.index for ref in shard.prompts]
            for n in range(plan.round_count or 0)
            for shard in plan.round(n)
        },
    }


def _rounds(config: ProbeConfig) -> int | None:
    """Rounds that the configuration allows; None where only time ends the run."""
    batch = config.batch
    allowed = [] if batch.rounds is None else [batch.rounds]
    if batch.max_sequences is not None:
        allowed.append(batch.max_sequences // (batch.prompts_per_round * batch.responses_per_prompt))
    return min(allowed, default=None)


def check_same_inputs(prepared: Prepared, earlier: dict[str, Any]) -> None:
    """Refuse to go on with a run whose inputs have changed. Raises ConfigError.

    Args:
        prepared: the run as it would be now.
        earlier: its manifest.json.
    """
    now = {
        "model.path": (prepared.checkpoint.fingerprint, earlier["checkpoint"]["fingerprint"]),
        "data.prompts": (prepared.prompts.sha256, earlier["prompts"]["sha256"]),
        "generation": (prepared.policy_id, earlier["policy_id"]),
        "config.yaml": (_config_sha256(prepared.config), earlier["config_sha256"]),
    }
    for field, (current, before) in now.items():
        if current != before:
            remedy = f"the run was started with {before[:12]}; restore it, or start a new run"
            raise ConfigError(bad_value(field, current[:12], remedy))


def changed_since(earlier: dict[str, Any], threads: int) -> list[str]:
    """What else fixes a result's bits and differs from the manifest of an earlier start, one line each."""
    now = package_versions() | {"python": platform.python_version()}
    then = earlier["versions"] | {"threads": earlier["threads_per_actor"]}
    return [f"{name} was {then.get(name)}, is {value}" for name, value in (now | {"threads": threads}).items()
            if then.get(name) != value]  # fmt: skip


def _config_sha256(config: ProbeConfig) -> str:
    """Of all settings that must not change when a run goes on."""
    fixed = {name: value for name, value in to_dict(config).items() if name not in ("cluster", "output")}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _absolute(config: ProbeConfig, checkpoint: Checkpoint) -> ProbeConfig:
    """Relative paths are resolved here, on the driver."""
    model = config.model.model_copy(update={"path": str(checkpoint.directory), "local_files_only": True})
    prompts = config.data.prompts
    data = config.data.model_copy(update={"prompts": str(Path(prompts).resolve())} if isinstance(prompts, str) else {})
    output = config.output.model_copy(update={"dir": str(Path(config.output.dir).resolve())})
    return config.model_copy(update={"model": model, "data": data, "output": output})


def _policy_id(config: ProbeConfig, checkpoint: Checkpoint) -> str:
    generation = config.generation
    parts = [
        checkpoint.fingerprint, config.model.dtype, generation.temperature, generation.top_p,
        generation.max_new_tokens, generation.eos_token_ids, config.estimator.x_estimator_mode,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _usable(config: ProbeConfig, checkpoint: Checkpoint, prompts: PromptSet) -> tuple[int, ...]:
    """Indices of the prompts that fit; a longer one is an error, or is skipped where the config says so."""
    context = context_length(checkpoint.config)
    room = None if context is None else context - config.generation.max_new_tokens
    if room is not None and room < 1:
        remedy = f"it leaves no room for a prompt in the model's context of {context}"
        raise ConfigError(bad_value("generation.max_new_tokens", config.generation.max_new_tokens, remedy))
    limits = [limit for limit in (room, config.data.max_prompt_tokens) if limit is not None]
    usable = []
    for index, length in enumerate(_lengths(checkpoint, prompts.texts)):
        if length == 0:
            raise PromptsError(f"{prompts.where(index)}: the prompt has no token; write at least one")
        if limits and length > min(limits):
            if config.data.on_long == "skip":
                continue
            raise PromptsError(_too_long(prompts.where(index), length, config, context))
        usable.append(index)
    return tuple(usable)


def _too_long(where: str, length: int, config: ProbeConfig, context: int | None) -> str:
    allowed = config.data.max_prompt_tokens
    if allowed is not None and length > allowed:
        reason = f"data.max_prompt_tokens is {allowed}"
    else:
        reason = f"with generation.max_new_tokens {config.generation.max_new_tokens} it passes the context of {context}"
    return f"{where}: the prompt has {length} tokens, {reason}; shorten it, or set data.on_long to skip"


def _lengths(checkpoint: Checkpoint, texts: Sequence[str]) -> list[int]:
    lengths: list[int] = []
    for start in range(0, len(texts), TOKENIZE_BATCH):
        part = list(texts[start : start + TOKENIZE_BATCH])
        encoded = checkpoint.tokenizer(part, verbose=False)["input_ids"]
        lengths += [len(ids) for ids in encoded]
    return lengths
