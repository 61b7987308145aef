"""The weights of a policy in memory, and the next checkpoint's copied over them tensor by tensor.

A swap is made only where it gives, bit for bit, what loading would: the same architecture, and files that hold exactly
the model's own tensors. Otherwise the old model is freed first and the new one is loaded by transformers.
"""

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ray_probe.checkpoints.adapter import adapter_settings, attach_adapter, fill_adapter
from ray_probe.checkpoints.files import TensorHeader, read_json, refuse, some
from ray_probe.checkpoints.load import load_model

# Keys of config.json that say nothing about what is computed: the dtype comes from the run's configuration.
_IRRELEVANT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Architecture:
    """Everything but the weights that decides which model is built: equal ones hold the same tensors.

    Attributes:
        config: config.json, without what is irrelevant.
        generation: generation_config.json: it says what ends a response.
        adapter: what adapter_config.json says of the policy, or None.
        dtype: of the weights, as in the configuration.
        device: where they are.
    """

    config: str
    generation: str
    adapter: str | None
    dtype: str
    device: str

    @classmethod
    def of(cls, directory: Path, adapter: Path | None, dtype: str, device: str) -> "Architecture":
        """Read it from a checkpoint and the adapter on it."""
        config = {key: v for key, v in read_json(directory, "config.json").items() if key not in _IRRELEVANT}
        generation = read_json(directory, "generation_config.json", required=False)
        generation.pop("transformers_version", None)
        settings = None if adapter is None else _text(adapter_settings(adapter))
        return cls(_text(config), _text(generation), settings, dtype, device)


@dataclass(frozen=True)
class Policy:
    """A model in memory.

    Attributes:
        model: the transformers model; an adapter's modules are inside it.
        wrapped: peft's wrapper of that model, or None without an adapter.
        tensors: the model's own parameters and buffers by their names in a checkpoint; tied names share one.
        architecture: what it was built from.
    """

    model: Any
    wrapped: Any | None
    tensors: Mapping[str, torch.Tensor]
    architecture: Architecture


def load_policy(directory: Path, adapter: Path | None, architecture: Architecture) -> Policy:
    """Load a checkpoint, and the adapter on it, to the architecture's device."""
    model = load_model(directory, architecture.dtype, architecture.device)
    tensors = model.state_dict(keep_vars=True)  # before an adapter's modules change the names
    wrapped = None if adapter is None else attach_adapter(model, adapter, architecture.device)
    return Policy(model, wrapped, tensors, architecture)


def can_swap(policy: Policy, architecture: Architecture, headers: Mapping[str, TensorHeader]) -> bool:
    """Whether copying the tensors of these files gives what loading them would.

    Not where transformers renamed or rebuilt tensors on loading, or where a name is missing, is unknown, has another
    shape, or stands beside the one that it is tied to: loading decides on those, or says what is wrong.
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


def swap_weights(policy: Policy, directory: Path, headers: Mapping[str, TensorHeader], adapter: Path | None) -> None:
    """Copy a checkpoint's tensors over a policy's for which `can_swap` holds, one at a time, and drop its gradients.

    Raises:
        CheckpointError: a tensor cannot be read, has another shape than its header said, or is not finite. Whatever is
            raised, the policy was released: nothing half-swapped is left to be used.
    """
    try:
        for parameter in policy.model.parameters():
            parameter.grad = None
        for file in sorted({header.file for header in headers.values()}):
            _copy(policy, directory, file, [name for name, header in headers.items() if header.file == file])
        if adapter is not None:
            fill_adapter(policy.wrapped, adapter, policy.architecture.device)
    except BaseException:
        release(policy.model)
        raise
    policy.model.eval()


def release(model: torch.nn.Module) -> None:
    """Give a model's memory back though it may still be referred to: nothing can be computed with it any more."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.grad = None
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def _copy(policy: Policy, directory: Path, file: Path, names: list[str]) -> None:
    spoilt = []
    try:
        with safe_open(file, framework="pt") as opened:
            for name in names:
                value, target = opened.get_tensor(name), policy.tensors[name]
                if value.shape != target.shape:
                    raise refuse(directory, f"{name} in {file.name} has changed while it was read; export it again")
                target.copy_(value)
                if not torch.isfinite(target).all():
                    spoilt.append(name)
    except (SafetensorError, OSError) as error:
        remedy = f"{file.name} is truncated or damaged ({error}); copy or export it again"
        raise refuse(directory, remedy) from error
    if spoilt:
        remedy = f"NaN or infinity in {len(spoilt)} tensors: {some(spoilt)}; export the checkpoint again"
        raise refuse(directory, remedy)


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
