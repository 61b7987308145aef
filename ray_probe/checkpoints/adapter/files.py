"""Inspect the files of an adapter without loading its weights."""

import json
from pathlib import Path
from typing import Any

from ray_probe.checkpoints.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json, unusable
from ray_probe.checkpoints.headers import file_headers
from ray_probe.errors import ConfigError, bad_value
from ray_probe.system.versions import how_to_install

FIELD = "model.adapter"
PREFIX = "base_model.model."  # peft's, before the model's own names
INERT_REMEDY = "train it for a step, or leave model.adapter null"
# Keys of adapter_config.json that do not change the policy, and keys of a plain LoRA. Any other key that is set asks
# for code that draws at random, changes the base weights, reads other files or depends on the tokens.
_DESCRIPTIVE = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision",
)  # fmt: skip
_PLAIN = (
    "alpha_pattern", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save", "peft_type", "r",
    "rank_pattern", "target_modules", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
)  # fmt: skip
_RESTRICTED: dict[str, tuple[object, ...]] = {
    "bias": ("none", "all", "lora_only"),
    "init_lora_weights": (True, False, "gaussian"),
    "task_type": (None, "CAUSAL_LM"),
}


def inspect_adapter(path: str) -> Path:
    """Check the files of an adapter; returns its directory.

    Raises:
        CheckpointError: it is half-written, damaged, pickled, or not a plain LoRA.
        ConfigError: the package peft is not installed.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise unusable(
            path, "no such directory", "give the directory of an adapter (relative: to the working directory)", FIELD
        )
    directory = directory.resolve()
    adapter_settings(directory)
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise unusable(
            directory,
            f"it has no {ADAPTER_WEIGHTS}",
            "save it again with safetensors (pickle weights are not loaded)",
            FIELD,
        )
    if not file_headers(directory, directory / ADAPTER_WEIGHTS, FIELD):
        raise unusable(directory, f"{ADAPTER_WEIGHTS} holds no tensor", "save it again", FIELD)
    import_peft()
    return directory


def adapter_settings(directory: Path) -> dict[str, Any]:
    """Return the keys of adapter_config.json that define the adapter's modules.

    Raises:
        CheckpointError: it is not a plain LoRA, or asks for remote code.
    """
    raw = read_json(directory, ADAPTER_CONFIG, field=FIELD)
    if "auto_map" in raw:
        raise unusable(
            directory, "it asks for remote code (auto_map), and trust_remote_code is off", "save it without", FIELD
        )
    if raw.get("peft_type") != "LORA":
        raise unusable(
            directory, f"its peft_type is {raw.get('peft_type')!r}", "need a LORA adapter, or merge it", FIELD
        )
    settings = {}
    for key, value in raw.items():
        if key in _DESCRIPTIVE or (key not in _PLAIN and key not in _RESTRICTED and not value):
            continue
        if key not in _PLAIN and value not in _RESTRICTED.get(key, ()):
            raise unusable(
                directory,
                f"{ADAPTER_CONFIG} sets {key} to {json.dumps(value)[:60]}, and only a plain LoRA can be measured",
                "convert it, or merge it into the weights",
                FIELD,
            )
        named = isinstance(value, list) and all(isinstance(item, str) for item in value)
        settings[key] = sorted(value) if named else value  # peft saves sets of names, in any order
    return settings


def import_peft() -> Any:
    """Import the optional package peft. Raises ConfigError when it is not installed."""
    try:
        import peft
    except ImportError as error:
        remedy = f"it needs the package peft, which is not here ({error}); {how_to_install('peft')}"
        raise ConfigError(bad_value(FIELD, "an adapter", remedy)) from error
    return peft
