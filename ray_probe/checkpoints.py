"""Loading a checkpoint so that what runs is what the directory says, and refusing it otherwise.

safetensors only, an explicit dtype, no remote code, and no tensor missing, unexpected or of another shape: transformers
would give a missing layer random weights and go on.
"""

import hashlib
import json
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
_INDEX = "model.safetensors.index.json"
_HASHED = ("*.safetensors", "*.json", "*.model", "*.jinja")


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
    raw = _read_json(directory, "config.json")
    if "auto_map" in raw or "auto_map" in _read_json(directory, "tokenizer_config.json", required=False):
        raise _refuse(directory, "it asks for remote code (auto_map), and trust_remote_code is off; convert it first")
    for file in _weight_files(directory):
        _check_header(file)
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
        )
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info[f"{kind}_keys"])
        if names:
            raise _refuse(directory, f"{len(names)} tensors are {kind}: {_some(names)}; export the checkpoint again")
    not_finite = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if not_finite:
        raise _refuse(directory, f"NaN or infinity in {len(not_finite)} tensors: {_some(not_finite)}")
    return model.to(device).eval()


def check_vocabulary(directory: Path, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that can name tokens which the model does not have."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise _refuse(directory, f"its tokenizer has {len(tokenizer)} tokens, the embeddings have {rows} rows")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _directory(settings: ModelConfig) -> Path:
    directory = Path(settings.path)
    if directory.is_dir():
        return directory.resolve()
    if settings.local_files_only:
        raise _refuse(settings.path, f"no such directory (relative paths start at {Path.cwd()})")
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
        raise _refuse(directory, f"it cannot be loaded ({text[0][:200]})") from error


def _read_json(directory: Path, name: str, required: bool = True) -> dict[str, Any]:
    path = directory / name
    if not path.is_file():
        if required:
            raise _refuse(directory, f"it has no {name}; give a directory that save_pretrained wrote")
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refuse(directory, f"{name} is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise _refuse(directory, f"{name} is not a JSON object")
    return raw


def _weight_files(directory: Path) -> list[Path]:
    index = _read_json(directory, _INDEX, required=False)
    if index:
        files = sorted({directory / name for name in index.get("weight_map", {}).values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise _refuse(directory, f"{_INDEX} names {_some(missing)}, which is not there; copy the whole checkpoint")
        return files
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise _refuse(directory, "need *.safetensors (pickle weights are not loaded)")
    return files


def _check_header(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise _refuse(file, f"it is truncated or damaged ({error}); copy or export it again") from error


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
