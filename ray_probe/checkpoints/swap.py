"""Keep a policy in memory, and copy the next checkpoint over its weights.

A swap must give, bit for bit, the same weights as loading. It needs the same architecture, and files with exactly the
model's own tensors. Otherwise the caller releases the old model and loads the new one.
"""

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ray_probe.checkpoints.adapter.files import adapter_settings
from ray_probe.checkpoints.adapter.load import attach_adapter, fill_adapter
from ray_probe.checkpoints.files import read_json, reading, refuse_not_finite, unusable
from ray_probe.checkpoints.headers import TensorHeader
from ray_probe.checkpoints.load import load_model

# Keys of config.json that do not change the computation; the dtype comes from the run's configuration.
_IRRELEVANT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Architecture:
    """The settings that a model is built from; equal ones give the same tensors.

    Attributes:
        config: config.json, without irrelevant keys.
        generation: generation_config.json, which names EOS ids.
        adapter: the adapter's settings, or None.
        dtype: of the weights, as in the configuration.
        device: of the weights.
    """

    config: str
    generation: str
    adapter: str | None
    dtype: str
    device: str

    @classmethod
    def of(cls, directory: Path, adapter: Path | None, dtype: str, device: str) -> "Architecture":
        """Read the architecture of a checkpoint and the adapter on it."""
        config = {key: v for key, v in read_json(directory, "config.json").items() if key not in _IRRELEVANT}
        generation = read_json(directory, "generation_config.json", required=False)
        generation.pop("transformers_version", None)
        settings = None if adapter is None else _text(adapter_settings(adapter))
        return cls(_text(config), _text(generation), settings, dtype, device)


@dataclass(frozen=True)
class Policy:
    """A model in memory.

    Attributes:
        model: the transformers model, with the modules of an adapter.
        wrapped: peft's wrapper of that model, or None without an adapter.
        tensors: the model's own parameters and buffers, by name in a checkpoint; tied names share one.
        architecture: the settings that it was built from.
    """

    model: Any
    wrapped: Any | None
    tensors: Mapping[str, torch.Tensor]
    architecture: Architecture


def load_policy(directory: Path, adapter: Path | None, architecture: Architecture) -> Policy:
    """Load a checkpoint, and the adapter on it, onto the architecture's device."""
    model = load_model(directory, architecture.dtype, architecture.device)
    tensors = model.state_dict(keep_vars=True)  # before an adapter's modules change the names
    wrapped = None if adapter is None else attach_adapter(model, adapter, architecture.device)
    return Policy(model, wrapped, tensors, architecture)


def can_swap(policy: Policy, architecture: Architecture, headers: Mapping[str, TensorHeader]) -> bool:
    """Return whether copying these tensors equals loading them.

    False if transformers renamed or rebuilt tensors on loading, or if a name is missing, unknown, of another shape, or
    stored beside a name tied to it. Loading handles those, or reports what is wrong.
    """
    if policy.architecture != architecture or getattr(policy.model, "_weight_conversions", None) != []:
        return False
    names: dict[int, list[str]] = {}
    for name, tensor in policy.tensors.items():
        names.setdefault(id(tensor), []).append(name)
    stored_once = all(sum(name in headers for name in tied) == 1 for tied in names.values())
    return stored_once and all(
        name in policy.tensors and policy.tensors[name].shape == header.shape for name, header in headers.items()
    )


def leaves_base(adapter: Path) -> bool:
    """Return whether an adapter brings no tensor of its base.

    A plain LoRA without biases or saved modules brings none.
    """
    settings = adapter_settings(adapter)
    own = [settings.get(key) for key in ("modules_to_save", "trainable_token_indices", "ensure_weight_tying")]
    return settings.get("peft_type") == "LORA" and settings.get("bias", "none") == "none" and not any(own)


def swap_weights(
    policy: Policy, directory: Path, headers: Mapping[str, TensorHeader], adapter: Path | None, has_base: bool = False
) -> None:
    """Copy a checkpoint's tensors over a policy's, and drop its gradients.

    With `has_base` the policy has these tensors already, under another adapter: only the adapter's are copied.

    `can_swap` must hold. After any error the policy is released, so that no half-swapped model is used.

    Raises:
        CheckpointError: a tensor cannot be read, has another shape than in its header, or is not finite.
    """
    try:
        for parameter in policy.model.parameters():
            parameter.grad = None
        for file in [] if has_base else sorted({header.file for header in headers.values()}):
            _copy(policy, directory, file, [name for name, header in headers.items() if header.file == file])
        if adapter is not None:
            fill_adapter(policy.wrapped, adapter, policy.architecture.device)
    except BaseException:
        release(policy.model)
        raise
    policy.model.eval()


def release(model: torch.nn.Module) -> None:
    """Free a model's memory even if references remain; it is unusable afterwards."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.grad = None
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def _copy(policy: Policy, directory: Path, file: Path, names: list[str]) -> None:
    not_finite = []
    for name in names:
        # Opened for each tensor: the pages of a mapped file stay in memory until it is closed, in all another model.
        with reading(directory, file), safe_open(file, framework="pt") as opened:
            value, target = opened.get_tensor(name), policy.tensors[name]
            if value.shape != target.shape:
                raise unusable(directory, f"{name} in {file.name} has changed while it was read", "export it again")
            target.copy_(value)
            del value
        if not torch.isfinite(target).all():
            not_finite.append(name)
    refuse_not_finite(directory, not_finite)


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
