"""Inspect a checkpoint, and the adapter on it, before any weight is loaded."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ray_probe.checkpoints.adapter.changes import refuse_untrained
from ray_probe.checkpoints.adapter.files import inspect_adapter
from ray_probe.checkpoints.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    CHECKPOINT_FILES,
    WEIGHTS,
    read_json,
    refuse_not_finite,
    unusable,
)
from ray_probe.checkpoints.fingerprint import read_through
from ray_probe.checkpoints.headers import weight_headers
from ray_probe.checkpoints.model_kinds import check_kind
from ray_probe.checkpoints.skeleton import build_skeleton, check_skeleton, loaded_names
from ray_probe.checkpoints.tokenizer.eos import Eos, resolve_eos, token_text
from ray_probe.checkpoints.tokenizer.load import PolicyTokenizer, open_tokenizer
from ray_probe.checkpoints.tokenizer.token_ids import check_token_ids
from ray_probe.checkpoints.transformers_calls import OFFLINE, guarded
from ray_probe.config.schema import ModelConfig
from ray_probe.errors import ConfigError, bad_value
from ray_probe.model.trainable import NO_ADAPTER

# Allowed values of keys in config.json, with or without a leading underscore. Any other value names a kernel that
# transformers may fetch from the hub, or a file other than the inspected one.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "attn_implementation": (None, "eager", "sdpa"),
    "experts_implementation": (None, "eager", "batched_mm", "grouped_mm"),
    "transformers_weights": (None, WEIGHTS),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that passed every check without weights.

    Attributes:
        directory: its path.
        fingerprint: sha256 of its weights, configuration and tokenizer files, hexadecimal; empty when not read.
        config: its transformers configuration.
        policy_tokenizer: tokenizer of the policy, the adapter's if it has one.
        rows: of its embeddings; token ids are smaller.
        adapter: directory of the adapter on it, or None.
        adapter_fingerprint: sha256 of the adapter's files, hexadecimal; empty without one.
    """

    directory: Path
    fingerprint: str
    config: Any
    policy_tokenizer: PolicyTokenizer
    rows: int
    adapter: Path | None = None
    adapter_fingerprint: str = ""

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the policy."""
        return self.policy_tokenizer.tokenizer

    def eos(self, explicit: Sequence[int] | None) -> Eos:
        """Choose the ids that end a response; see `resolve_eos`."""
        return resolve_eos(explicit, self.policy_tokenizer.eos_sources, self.rows, token_text(self.tokenizer))


def inspect_checkpoint(settings: ModelConfig, hashed: bool = True) -> Checkpoint:
    """Check a checkpoint, and the adapter on it, without loading weights.

    Args:
        settings: the config section `model`.
        hashed: also read every byte, for the fingerprints and to find NaN and infinity.

    Raises:
        CheckpointError: for the first problem found.
        ConfigError: `model.trainable` matches no parameter or one that text does not reach, or peft is not installed.
    """
    if settings.trainable == "adapter" and settings.adapter is None:
        raise ConfigError(bad_value("model.trainable", settings.trainable, NO_ADAPTER))
    directory = _directory(settings)
    _check_settings(directory)
    headers = weight_headers(directory)
    with guarded(directory):
        config = AutoConfig.from_pretrained(directory, **OFFLINE)
        check_kind(directory, config)
    adapter = None if settings.adapter is None else inspect_adapter(settings.adapter)
    tokenizer = open_tokenizer(directory, adapter, config)
    skeleton = build_skeleton(directory, headers, config, settings.dtype)
    rows = skeleton.get_input_embeddings().weight.shape[0]
    check_token_ids(tokenizer, rows)
    check_skeleton(skeleton, adapter, settings.trainable)
    if adapter is not None:
        refuse_untrained(adapter, headers)
    found = Checkpoint(directory, "", config, tokenizer, rows, adapter)
    return _read(found, {header.file for header in headers.values()}, skeleton) if hashed else found


def _read(found: Checkpoint, weights: Collection[Path], skeleton: Any) -> Checkpoint:
    """Add the fingerprints. Raises CheckpointError when a weight is not finite."""
    contents = read_through(found.directory, CHECKPOINT_FILES, weights)
    refuse_not_finite(found.directory, loaded_names(skeleton, contents.not_finite))
    found = replace(found, fingerprint=contents.fingerprint)
    if found.adapter is None:
        return found
    contents = read_through(found.adapter, ADAPTER_FILES, [found.adapter / ADAPTER_WEIGHTS])
    refuse_not_finite(found.adapter, contents.not_finite, "model.adapter")
    return replace(found, adapter_fingerprint=contents.fingerprint)


def _directory(settings: ModelConfig) -> Path:
    if os.path.isdir(settings.path):
        return Path(settings.path).resolve()
    if settings.local_files_only:
        raise unusable(
            settings.path,
            "no such directory",
            "give the directory of a checkpoint (relative: to the working directory)",
        )
    from huggingface_hub import snapshot_download

    with guarded(settings.path):
        return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=[*CHECKPOINT_FILES]))


def _check_settings(directory: Path) -> None:
    """Refuse JSON files that are unreadable or point to other code or weights."""
    if (directory / ADAPTER_CONFIG).is_file():
        raise unusable(
            directory,
            f"it holds an adapter ({ADAPTER_CONFIG})",
            "name it in model.adapter and its base model in model.path",
        )
    raw = read_json(directory, "config.json")
    if "auto_map" in raw or "auto_map" in read_json(directory, "tokenizer_config.json", required=False):
        raise unusable(
            directory, "it asks for remote code (auto_map), and trust_remote_code is off", "convert it first"
        )
    sections = [section for section in (raw, *raw.values()) if isinstance(section, dict)]
    for key, value in (item for section in sections for item in section.items()):
        if value not in _ALLOWED.get(key.removeprefix("_"), (value,)):
            raise unusable(directory, f"config.json sets {key}, which can bring in other code or weights", "remove it")
    if raw.get("quantization_config"):
        raise unusable(directory, "its weights are quantised (quantization_config)", "export it in float32 or bfloat16")
    read_json(directory, "generation_config.json", required=False)  # transformers would silently drop its EOS ids
