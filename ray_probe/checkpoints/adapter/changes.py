"""Refuse an untrained adapter by its files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ray_probe.checkpoints.adapter.files import FIELD, INERT_REMEDY, PREFIX, adapter_settings
from ray_probe.checkpoints.files import ADAPTER_WEIGHTS, unusable
from ray_probe.checkpoints.headers import TensorHeader

_FACTORS = {"lora_B": "lora_A", "lora_embedding_B": "lora_embedding_A"}  # a LoRA adds their product
_TOKENS = ".token_adapter.trainable_tokens_delta"


def refuse_untrained(directory: Path, base: Mapping[str, TensorHeader]) -> None:
    """Refuse an adapter of which no tensor changes the base model.

    A tensor whose name and shape the base model lacks counts as a change; loading then compares logits.

    Args:
        directory: of the adapter.
        base: headers of the checkpoint below it.

    Raises:
        CheckpointError: nothing was trained.
    """
    tokens = adapter_settings(directory).get("trainable_token_indices")
    with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as opened:
        if any(_changes(opened, name, base, tokens) for name in opened.keys()):  # noqa: SIM118
            return
    raise unusable(
        directory,
        "it is inert: its lora_B is all zero, and nothing else in it differs from the base model",
        INERT_REMEDY,
        FIELD,
    )


def _changes(opened: Any, name: str, base: Mapping[str, TensorHeader], tokens: Any) -> bool:
    if any(first in name for first in _FACTORS.values()):
        return False  # judged with the second factor
    value = opened.get_tensor(name)
    for second, first in _FACTORS.items():
        if second in name:
            return bool(value.any() and opened.get_tensor(name.replace(second, first)).any())
    path = name.removeprefix(PREFIX)
    if path.endswith(_TOKENS):
        module = path.removesuffix(_TOKENS)
        return not _equal(value, _stored(base, f"{module}.weight", _tokens_of(module, tokens)))
    path = path.replace(".base_layer.", ".")
    # A tied head is stored only under the embedding's name.
    names = [path] if path in base else [other for other, header in base.items() if header.shape == tuple(value.shape)]
    return not any(_equal(value, _stored(base, other)) for other in names)


def _equal(value: torch.Tensor, before: torch.Tensor | None) -> bool:
    return before is not None and before.shape == value.shape and torch.equal(before.double(), value.double())


def _tokens_of(module: str, tokens: Any) -> list[int]:
    """Return the trained tokens of an embedding or a head."""
    if isinstance(tokens, dict):
        tokens = next((indices for name, indices in tokens.items() if module.endswith(name)), None)
    return tokens or []


def _stored(base: Mapping[str, TensorHeader], name: str, rows: Iterable[int] | None = None) -> torch.Tensor | None:
    """Return a tensor of the checkpoint, or only these rows; None if it is absent."""
    if name not in base:
        return None
    with safe_open(base[name].file, framework="pt") as opened:
        part = opened.get_slice(name)
        tensor: torch.Tensor = part[:] if rows is None else torch.cat([part[row : row + 1] for row in rows])
        return tensor
