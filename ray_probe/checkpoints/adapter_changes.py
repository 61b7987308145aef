"""Refuse an untrained adapter by its files, before anything is loaded."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ray_probe.checkpoints.adapter import FIELD, INERT_REMEDY, PREFIX, adapter_settings
from ray_probe.checkpoints.files import ADAPTER_WEIGHTS, TensorHeader, refuse

_FACTORS = {"lora_B": "lora_A", "lora_embedding_B": "lora_embedding_A"}  # their product is what a LoRA adds
_TOKENS = ".token_adapter.trainable_tokens_delta"


def refuse_untrained(directory: Path, base: Mapping[str, TensorHeader]) -> None:
    """Refuse an adapter whose every tensor leaves the base model as it is.

    What cannot be compared here, a tensor of another name or shape than the base model's, counts as a change: the
    loaded model is asked whether its logits move.

    Args:
        directory: of the adapter.
        base: the tensors of the checkpoint that it is put on.

    Raises:
        CheckpointError: nothing was trained.
    """
    tokens = adapter_settings(directory).get("trainable_token_indices")
    with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as opened:
        if any(_changes(opened, name, base, tokens) for name in opened.keys()):  # noqa: SIM118
            return
    remedy = "it is inert: its lora_B is all zero, and nothing else in it differs from the base model"
    raise refuse(directory, f"{remedy}; {INERT_REMEDY}", FIELD)


def _changes(opened: Any, name: str, base: Mapping[str, TensorHeader], tokens: Any) -> bool:
    """Whether one tensor of the adapter changes the model."""
    if any(first in name for first in _FACTORS.values()):
        return False  # looked at with the second factor
    value = opened.get_tensor(name)
    for second, first in _FACTORS.items():
        if second in name:
            return bool(value.any() and opened.get_tensor(name.replace(second, first)).any())
    path = name.removeprefix(PREFIX)
    if path.endswith(_TOKENS):
        module = path.removesuffix(_TOKENS)
        return not _equal(value, _stored(base, f"{module}.weight", _tokens_of(module, tokens)))
    path = path.replace(".base_layer.", ".")
    # A tied head is stored under the embedding's name alone.
    names = [path] if path in base else [other for other, header in base.items() if header.shape == tuple(value.shape)]
    return not any(_equal(value, _stored(base, other)) for other in names)


def _equal(value: torch.Tensor, before: torch.Tensor | None) -> bool:
    return before is not None and before.shape == value.shape and torch.equal(before.double(), value.double())


def _tokens_of(module: str, tokens: Any) -> list[int]:
    """The tokens that are trained in an embedding or a head."""
    if isinstance(tokens, dict):
        tokens = next((indices for name, indices in tokens.items() if module.endswith(name)), None)
    return tokens or []


def _stored(base: Mapping[str, TensorHeader], name: str, rows: Iterable[int] | None = None) -> torch.Tensor | None:
    """A tensor of the checkpoint, or rows of it; None where it has none of that name."""
    if name not in base:
        return None
    with safe_open(base[name].file, framework="pt") as opened:
        part = opened.get_slice(name)
        tensor: torch.Tensor = part[:] if rows is None else torch.cat([part[row : row + 1] for row in rows])
        return tensor
