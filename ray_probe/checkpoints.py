"""Loading a checkpoint so that what runs is what the directory says, and refusing it otherwise.

safetensors only, an explicit dtype, no remote code, and no tensor missing, unexpected or of another shape: transformers
would give a missing layer random weights and go on.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ray_probe.config import ModelConfig
from ray_probe.errors import CheckpointError, bad_value

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HASHED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
# What config.json may set these to (with or without a leading underscore): all else is a kernel whose code transformers
# may fetch from the hub, or a file other than the one that is checked here.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "attn_implementation": (None, "eager", "sdpa"),
    "experts_implementation": (None, "eager", "batched_mm", "grouped_mm"),
    "transformers_weights": (None, _WEIGHTS),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that passed the checks which need no weights in memory.

    Attributes:
        directory: where it lies.
        fingerprint: sha256 of its weights, configuration and tokenizer files, hexadecimal.
        config: the transformers configuration.
        tokenizer: its tokenizer.
    """

    directory: Path
    fingerprint: str
    config: Any
    tokenizer: Any


def _refuse(directory: Path | str, remedy: str) -> CheckpointError:
    return CheckpointError(bad_value("model.path", str(directory), " ".join(remedy.split())))


def inspect_checkpoint(settings: ModelConfig) -> Checkpoint:
    """Check a checkpoint without loading its weights. Raises CheckpointError with one line."""
    directory = _directory(settings)
    _check_settings(directory)
    for file in _weight_files(directory):
        _check_header(directory, file)
    with _quiet():
        config = _guarded(directory, AutoConfig.from_pretrained, directory)
        tokenizer = load_tokenizer(directory)
    return Checkpoint(directory, _fingerprint(directory), config, tokenizer)


def load_tokenizer(directory: Path) -> Any:
    """The checkpoint's tokenizer."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise _refuse(directory, "it has no tokenizer; put tokenizer.json beside the weights")
    return _guarded(directory, AutoTokenizer.from_pretrained, directory)


def load_model(directory: Path, dtype: str, device: torch.device | str = "cpu") -> Any:
    """Load the weights, eval mode, on the device. Raises CheckpointError naming what does not fit."""
    with _quiet():
        model, info = _guarded(
            directory,
            AutoModelForCausalLM.from_pretrained,
            directory,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported with its name below, not refused without one
        )
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info[f"{kind}_keys"])
        if names:
            raise _refuse(directory, f"{len(names)} tensors are {kind}: {_some(names)}; export the checkpoint again")
    not_finite = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if not_finite:
        remedy = f"NaN or infinity in {len(not_finite)} tensors: {_some(not_finite)}; export the checkpoint again"
        raise _refuse(directory, remedy)
    return model.to(device).eval()


def check_vocabulary(directory: Path, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that can name tokens which the model does not have."""
    rows = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        remedy = f"its tokenizer has ids up to {largest}, the embeddings have {rows} rows; resize them, or put in the "
        raise _refuse(directory, remedy + "tokenizer that the model was trained with")


def check_fingerprint(directory: Path, expected: str) -> None:
    """Refuse a checkpoint that is not the one that the run measures: overwritten since, or another node's copy."""
    found = _fingerprint(directory)
    if found != expected:
        remedy = (
            f"its files on node {platform.node()} have the fingerprint {found[:12]}, the run measures {expected[:12]}"
        )
        raise _refuse(directory, f"{remedy}; keep a checkpoint as it is while it is measured")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _directory(settings: ModelConfig) -> Path:
    if os.path.isdir(settings.path):
        return Path(settings.path).resolve()
    if settings.local_files_only:
        remedy = f"no such directory; give the directory of a checkpoint (relative paths start at {Path.cwd()})"
        raise _refuse(settings.path, remedy)
    from huggingface_hub import snapshot_download

    found = _guarded(
        settings.path, snapshot_download, settings.path, revision=settings.revision, allow_patterns=_HASHED
    )
    return Path(found)


def _guarded(directory: Path | str, load: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a loader of transformers offline and without remote code; its errors become one line."""
    if load.__name__ == "from_pretrained":
        kwargs |= {"local_files_only": True, "trust_remote_code": False}
    try:
        return load(*args, **kwargs)
    except Exception as error:  # loaders raise whatever their parsers raise
        text = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "check its files, and that this version of transformers knows the model"
        raise _refuse(directory, f"it cannot be loaded ({text[0][:200]}); {remedy}") from error


def _check_settings(directory: Path) -> None:
    """Refuse JSON files that transformers would not read, or would follow to something else."""
    raw = _read_json(directory, "config.json")
    if "auto_map" in raw or "auto_map" in _read_json(directory, "tokenizer_config.json", required=False):
        raise _refuse(directory, "it asks for remote code (auto_map), and trust_remote_code is off; convert it first")
    sections = [section for section in (raw, *raw.values()) if isinstance(section, dict)]
    for key, value in (item for section in sections for item in section.items()):
        if value not in _ALLOWED.get(key.removeprefix("_"), (value,)):
            raise _refuse(directory, f"config.json sets {key}, which can bring in other code or weights; remove it")
    if (directory / "adapter_config.json").is_file():
        raise _refuse(directory, "it holds an adapter, which is not supported yet; merge it into the weights")
    _read_json(directory, "generation_config.json", required=False)  # its EOS ids would be dropped without a word


def _read_json(directory: Path, name: str, required: bool = True) -> dict[str, Any]:
    path = directory / name
    if not path.is_file():
        if required:
            raise _refuse(directory, f"it has no {name}; give a directory that save_pretrained wrote")
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refuse(directory, f"{name} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(raw, dict):
        raise _refuse(directory, f"{name} is not a JSON object; copy it again")
    return raw


def _weight_files(directory: Path) -> list[Path]:
    """The weight files that transformers will load: one file, else the shards that the index names."""
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if not (directory / _INDEX).is_file():
        raise _refuse(directory, f"it has no {_WEIGHTS}; export it with safetensors (pickle weights are not loaded)")
    shards = _read_json(directory, _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise _refuse(directory, f"{_INDEX} has no weight_map of file names; copy the whole checkpoint")
    names = sorted(set(shards.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise _refuse(directory, f"{_INDEX} names {_some(outside)}, which is not in the directory; copy it there")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise _refuse(directory, f"{_INDEX} names {_some(missing)}, which is not there; copy the whole checkpoint")
    return [directory / name for name in names]


def _check_header(directory: Path, file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise _refuse(directory, f"{file.name} is truncated or damaged ({error}); copy or export it again") from error


def _fingerprint(directory: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _HASHED for file in directory.glob(pattern)}):
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


class _quiet:
    """No progress bars and load reports of transformers: what matters is raised."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *error: Iterable[object]) -> None:
        transformers_logging.set_verbosity(self._verbosity)
